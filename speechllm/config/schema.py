"""The configuration of a run: typed, frozen, every field described and bounded."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DtypeName = Literal["float32", "bfloat16", "float16"]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
DEFAULT_PROMPT = "音声を書き起こしてください。"
DEFAULT_TEMPLATE = "{prompt}\n{audio}\n"


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True, allow_inf_nan=False
    )


class EncoderConfig(Section):
    """The frozen speech encoder."""

    name: str
    """Folder or model-hub name of a Hugging Face speech encoder."""
    revision: str | None = None
    """Branch, tag or commit on the model hub; null takes its main branch."""
    layer: int | None = None
    """Hidden layer whose output is used, 1 for the first; the last one, with its final norm, when null."""
    pad_to_30s: bool = False
    """Whisper only: pad every utterance to 30 s as in its training, and keep only the true frames."""
    dtype: DtypeName = "float32"
    """Precision the encoder computes in; how frames are stored is `stored`."""
    stored: Literal["float16", "int8"] = "float16"
    """How frames are stored: two bytes a value, or one with a scale a frame, half the disk (docs/benchmarks.md)."""
    train: bool = False
    """Train all of it too; frames are then made anew in every step, from data directories instead of dumps."""


class LmConfig(Section):
    """The frozen language model."""

    name: str
    """Folder or model-hub name of a Hugging Face causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the model hub; null takes its main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen weights in training; auto is bfloat16 where the machine computes in it, else float32."""
    cut_vocabulary: bool = False
    """Keep only the tokens that Japanese text and the training set use; other text falls back to bytes."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen linear layers in four bits (QLoRA); the rest stays in `dtype`."""
    train: bool = False
    """Train all of it instead of an adapter; its weights are then held in float32."""


class LoraConfig(Section):
    """The adapter of the language model."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of the two factors."""
    alpha: PositiveFloat = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout before the first factor."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


class ConvMlpProjector(Section):
    """The published projector: one strided convolution, then a two-layer perceptron."""

    kind: Literal["conv_mlp"] = "conv_mlp"
    """Names this variant."""
    stride: Annotated[int, Field(ge=1, le=50)] = 5
    """Encoder frames a projected token; also the kernel (20 ms frames: 5 is 100 ms)."""
    hidden: PositiveInt = 2048
    """Width between the two linear layers."""


class LinearProjector(Section):
    """Neighbouring frames stacked, then one linear map."""

    kind: Literal["linear"] = "linear"
    """Names this variant."""
    stride: Annotated[int, Field(ge=1, le=50)] = 5
    """Encoder frames stacked into one projected token."""


class NueProjector(Section):
    """Nue-ASR's bridge: two strided convolutions with GELU, then one linear map (Hono 2023, sec. 3.1)."""

    kind: Literal["nue"] = "nue"
    """Names this variant."""
    kernel: Annotated[int, Field(ge=1, le=50)] = 4
    """Frames that each convolution sees; nothing is padded."""
    stride: Annotated[int, Field(ge=1, le=50)] = 2
    """Stride of each convolution."""


class CtcProjector(Section):
    """A kana recogniser in front: its posteriors weight the language model's own kana embeddings."""

    kind: Literal["ctc"] = "ctc"
    """Names this variant."""
    hidden: PositiveInt = 512
    """Channels of the two convolutions of the head."""
    stride: Annotated[int, Field(ge=1, le=8)] = 2
    """Stride of the first convolution."""
    dropout: Fraction = 0.1
    """Dropout in the head, also while the language model learns to read its output."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 5
    """Passes over the training set that train the head alone, before the language model's turn."""
    peak_lr: PositiveFloat = 1e-3
    """Learning rate of these passes after the warm-up."""
    batch_frames: PositiveInt = 8000
    """Encoder frames a batch of these passes, padding included."""


Projector = Annotated[ConvMlpProjector | LinearProjector | NueProjector | CtcProjector, Field(discriminator="kind")]


class AugmentConfig(Section):
    """Changes to sounds and features, each a pure function of seed, epoch and utterance; the first six need sounds."""

    speeds: tuple[Annotated[float, Field(ge=0.5, le=2.0)], ...] = ()
    """Speed factors to draw from, such as 0.9, 1.0, 1.1; the pitch changes with them."""
    noise_dir: str | None = None
    """Folder of noises, searched with its folders."""
    noise_part: Fraction = 0.5
    """Part of the utterances that get noise."""
    snr_db: tuple[float, float] = (5.0, 20.0)
    """Least and most decibels between speech and noise."""
    reverb_dir: str | None = None
    """Folder of impulse responses, searched with its folders."""
    reverb_part: Fraction = 0.5
    """Part of the utterances that are put into a room."""

    time_masks: Annotated[int, Field(ge=0, le=20)] = 0
    """Stretches set to the utterance's mean, each utterance."""
    max_time_mask_frames: PositiveInt = 10
    """Longest stretch, in encoder frames."""
    channel_masks: Annotated[int, Field(ge=0, le=20)] = 0
    """Bands of feature channels set to the utterance's mean, each utterance."""
    max_channel_mask: PositiveInt = 32
    """Widest band, in channels."""
    noise: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Gaussian noise added, as a fraction of the utterance's standard deviation."""

    @property
    def changes_sounds(self) -> bool:
        """Return whether sounds are changed, which stored features have no part in."""
        return bool(self.speeds or self.noise_dir or self.reverb_dir)

    @property
    def changes_features(self) -> bool:
        """Return whether encoder frames are changed."""
        return bool(self.time_masks or self.channel_masks or self.noise)


class TrainConfig(Section):
    """Training of projector and adapter."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """Passes over the training set; a fraction ends within a pass."""
    batch_tokens: PositiveInt = 4096
    """Language-model positions a batch, padding included; what fits is decided by length."""
    packing: bool = True
    """Put the utterances of a batch one after another in one row, without padding, none of which sees another."""
    share_prompt: bool = True
    """With packing: what stands before the sound is computed once a row, not once an utterance."""
    checkpointing: bool = False
    """Compute the blocks of the language model again in the backward pass instead of keeping what is inside them."""
    compile: bool = False
    """Compile the blocks of the language model with torch.compile; the first steps then take minutes."""
    shard: bool = False
    """Spread the frozen language model's blocks over the processes (FSDP2), where one card cannot hold them."""
    accumulate: PositiveInt = 1
    """Batches summed into one step; several processes share them out, so the result is that of one."""
    peak_lr: PositiveFloat = 1e-4
    """Learning rate of the projector after the warm-up."""
    lora_lr: PositiveFloat = 1e-4
    """Learning rate of the adapter after the warm-up."""
    adapter_from: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the steps that train the projector alone; then the adapter joins, with a warm-up of its own."""
    base_lr: PositiveFloat = 1e-5
    """Learning rate of encoder and language model where they are trained themselves."""
    warmup: Fraction = 0.03
    """Part of the steps over which the learning rate rises linearly; then it falls as a cosine."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """AdamW's decay of matrices; vectors have none."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    validate_every: PositiveInt = 100
    """Steps between two looks at the validation set."""
    valid_utts: PositiveInt = 64
    """Utterances of the validation set that are decoded for the CER, spread evenly over the ids."""
    save_every: PositiveInt = 50
    """Steps between two saved states."""
    patience: PositiveInt | None = None
    """Validations without a better CER after which training ends; null goes on to the last step."""
    average: Annotated[int, Field(ge=1, le=100)] = 1
    """States of as many validations whose mean becomes the model, where its CER on the validation set is no worse."""
    average_of: Literal["best", "last"] = "best"
    """Which validations these are."""
    max_dropped: Fraction = 0.01
    """Part of the training set that may be left out as too long before the run is refused."""
    augment: AugmentConfig = AugmentConfig()
    """Changes to the features while training."""


class DecodeConfig(Section):
    """Search for the text."""

    beam: Annotated[int, Field(ge=1, le=64)] = 1
    """Hypotheses kept; 1 is greedy search."""
    length_penalty: Annotated[float, Field(ge=-5.0, le=5.0)] = 0.0
    """A finished hypothesis is ranked by log probability / tokens ** this."""
    batch_size: PositiveInt = 32
    """Utterances decoded together, of like length."""
    dtype: DtypeName = "float32"
    """Precision of the language model; in float32 the batch never changes a text."""
    tokens_per_s: Annotated[float, Field(gt=0, le=1000)] = 10.0
    """Most tokens a second of sound, on top of the next."""
    extra_tokens: Annotated[int, Field(gt=0, le=10_000)] = 20
    """Tokens allowed whatever the duration."""
    min_tokens: Annotated[int, Field(ge=0, le=100)] = 0
    """Fewest tokens before the end of the text is allowed."""
    join_s: Annotated[float, Field(ge=1.0, le=30.0)] = 30.0
    """Stretches of speech of a recording are joined to at most this: about the longest sounds of the training set."""
    mend_loops: bool = True
    """Decode a text that repeats itself again, without more repetitions than people say; it is flagged."""
    normalize: str = "raw"
    """Text profile applied to what was decoded, for a reader; scoring has its own."""


class HeadsConfig(Section):
    """Heads that `speechllm heads` adds to a trained model: kana for times, tokens for drafts."""

    tokens: bool = True
    """Train a head over the language model's tokens too: drafts, which make decoding faster."""
    hidden: Annotated[int, Field(ge=1, le=8192)] = 512
    """Channels of the two convolutions of a head."""
    stride: Annotated[int, Field(ge=1, le=8)] = 2
    """Stride of the first convolution."""
    dropout: Fraction = 0.1
    """Dropout in a head."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 5
    """Passes over the training set."""
    peak_lr: PositiveFloat = 1e-3
    """Learning rate after the warm-up."""
    batch_frames: PositiveInt = 8000
    """Encoder frames a batch, padding included."""


class Config(Section):
    """Everything that decides the outcome of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """All randomness is a function of this, the epoch and the utterance id."""
    device: DeviceName = "auto"
    """`auto` takes the GPU where there is one."""
    prompt: str = DEFAULT_PROMPT
    """What the language model is asked; stored with the model."""
    template: str = DEFAULT_TEMPLATE
    """What the language model reads before its answer: `{prompt}` and `{audio}` stand for themselves."""
    encoder: EncoderConfig
    """Frozen speech encoder."""
    lm: LmConfig
    """Frozen language model."""
    projector: Projector = ConvMlpProjector()
    """What joins the two."""
    lora: LoraConfig | None = LoraConfig()
    """Adapter of the language model; null trains the projector alone."""
    train: TrainConfig = TrainConfig()
    """Training."""
    decode: DecodeConfig = DecodeConfig()
    """Decoding."""
    heads: HeadsConfig = HeadsConfig()
    """Heads that a trained model may be given."""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """Refuse what cannot be meant."""
        if self.template.count("{audio}") != 1:
            raise ValueError("template must hold {audio} once")
        if self.lm.train and (self.lora is not None or self.lm.quantize is not None):
            raise ValueError("lm.train goes with lora: null and lm.quantize: null")
        if self.lora is None and self.train.adapter_from:
            raise ValueError("train.adapter_from needs an adapter (lora)")
        if self.train.shard and (self.lm.train or self.lm.quantize is not None):
            raise ValueError("train.shard goes with lm.train: false and lm.quantize: null")
        if self.train.augment.snr_db[0] > self.train.augment.snr_db[1]:
            raise ValueError("train.augment.snr_db must be the least and then the most")
        if self.lm.train and self.lm.dtype == "float16":
            raise ValueError("lm.train goes with lm.dtype auto, bfloat16 or float32")
        if self.encoder.train:
            self._check_trained_encoder()
        return self

    def _check_trained_encoder(self) -> None:
        if self.train.augment.changes_features:
            raise ValueError("train.augment masks features of a frozen encoder, which encoder.train does without")
        if self.encoder.dtype != "float32":
            raise ValueError("encoder.train goes with encoder.dtype float32: a smaller one would round steps away")
        if self.projector.kind == "ctc":
            raise ValueError("projector ctc is trained on a frozen encoder, so encoder.train must be false")

    @property
    def feature_tag(self) -> str:
        """Return the name of the folder of its features; empty where the encoder reads the sounds in every step."""
        encoder = self.encoder
        if encoder.train:
            return ""
        parts = [PurePath(encoder.name).name]
        parts += [encoder.revision.replace("/", "-")] if encoder.revision else []
        parts += [f"layer{encoder.layer}"] if encoder.layer else []
        parts += ["30s"] if encoder.pad_to_30s else []
        parts += [encoder.dtype] if encoder.dtype != "float32" else []
        parts += [encoder.stored] if encoder.stored != "float16" else []
        return "-".join(parts)
