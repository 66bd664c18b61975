"""Files made to hurt a decoder."""

from __future__ import annotations

BLOCK_SAMPLES = 65_535
RATE_HZ = 16_000


def flac_bomb(num_blocks: int, claimed_samples: int | None = None) -> bytes:
    """Return a FLAC of silence, 15 bytes for each 131 kB of samples (https://www.rfc-editor.org/rfc/rfc9639).

    Its header says `claimed_samples`, where given; 0 stands for unknown.
    """
    total = num_blocks * BLOCK_SAMPLES if claimed_samples is None else claimed_samples
    sizes = BLOCK_SAMPLES.to_bytes(2, "big") * 2 + bytes(6)
    stream_info = sizes + ((RATE_HZ << 44) | (15 << 36) | total).to_bytes(8, "big") + bytes(16)
    head = b"fLaC" + (0x80000000 | len(stream_info)).to_bytes(4, "big") + stream_info
    return head + b"".join(_silent_block(number) for number in range(num_blocks))


def _silent_block(number: int) -> bytes:
    """Return a frame that holds one constant subframe."""
    header = b"\xff\xf8\x70\x08" + _utf8(number) + (BLOCK_SAMPLES - 1).to_bytes(2, "big")
    header += bytes([_crc(header, 8, 0x07)])
    frame = header + b"\x00\x00\x00"
    return frame + _crc(frame, 16, 0x8005).to_bytes(2, "big")


def _utf8(number: int) -> bytes:
    return chr(number if number < 0xD800 else number + 0x800).encode()


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (bits - 1) & 1 else 0)
            value &= (1 << bits) - 1
    return value
