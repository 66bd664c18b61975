"""What the corpus holds: `utterances` is the one function to fill in.

The rest is done for you: ids, sets, texts, sounds and times are checked, and Kaldi directories written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.data.kaldi import Utterance

if TYPE_CHECKING:
    from collections.abc import Iterator

CORPUS = Path("/path/to/the/corpus")
Found = tuple[str | None, Utterance]


def utterances() -> Iterator[Found]:
    """Yield the set and the utterance of everything in the corpus, in any order.

    The set is ``train``, ``dev`` or ``eval``, or begins with ``eval``, as ``eval2`` does. Where all are None,
    whole speakers are held out: a twentieth of the utterances for dev, a twentieth for eval.

    An utterance is ``Utterance(utt_id, wav, start_s, end_s, text, speaker)``:

    * utt_id: its name, once in the corpus, without blanks or slashes;
    * wav: path of its sound, WAV, FLAC, OGG or MP3 of any rate;
    * start_s, end_s: its part of a longer recording in seconds; leave them out where the file is the utterance;
    * text: what was said;
    * speaker: who said it; leave it out where that is not known.

    For a folder ``wav`` beside a file ``transcripts.txt`` with lines ``ID TEXT`` (`read_table` is in
    speechllm.data.kaldi)::

        for utt_id, text in read_table(CORPUS / "transcripts.txt").items():
            yield None, Utterance(utt_id, CORPUS / "wav" / f"{utt_id}.wav", text=text, speaker=utt_id.split("_")[0])
    """
    # ---- fill in: your lines instead of the next ----
    raise NotImplementedError
