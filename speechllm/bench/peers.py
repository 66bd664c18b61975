"""How others train the same model: SLAM-LLM's loop, and transformers' Trainer. Written here after what they do.

What they share with ours is what is trained and what it is trained on: the same weights, the same features from the
encoder (SLAM-LLM runs its encoder in every step; that time is left out for all), the prompt before the sound, no
dropout. Their utterances are tokenized and in memory before the clock starts.

Shapes: b batch, e encoder frames, h encoder width, p projected audio tokens, l LM sequence, d LM width.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from speechllm.bench.corpus import SPECIALS
from speechllm.bench.models import sharing_copy
from speechllm.errors import ConfigError
from speechllm.model.projector import ConvMlp
from speechllm.text import prompt as prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from speechllm.bench.models import Made
    from speechllm.config.schema import Config
    from speechllm.train.sets import AnySet

IGNORED = -100
PAD_ID = SPECIALS.index("<pad>")
SLAM_BATCH, TRAINER_BATCH = 4, 16


@dataclass(frozen=True)
class Item:
    """One utterance as a peer's data set hands it out."""

    frames_eh: Tensor
    audio_tokens: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]


class Items(Dataset[Item]):
    """The utterances in an order that is random and always the same."""

    def __init__(self, features: AnySet, made: Made, seed: int) -> None:
        """Read all features and tokenize all texts."""
        order = torch.randperm(len(features.examples), generator=torch.Generator().manual_seed(seed)).tolist()
        examples = [list(features.examples.values())[place] for place in order]
        frames = features.frames_of([example.utt_id for example in examples])
        parts = [prompts.build(made.model.lm.tokenizer, made.model.form, example.text) for example in examples]
        counts = [made.model.projector.expected_tokens(example.num_frames) for example in examples]
        self.items = [
            Item(torch.from_numpy(matrix), count, part.before, part.after, part.answer)
            for matrix, count, part in zip(frames, counts, parts, strict=True)
        ]

    def __len__(self) -> int:
        """Return the number of utterances."""
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        """Return an utterance."""
        return self.items[index]


class Batch(TypedDict):
    """Padded tensors; the two masks are True where a position is read, and where it is sound."""

    frames_beh: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    is_audio: Tensor
    labels: Tensor


class Collator:
    """Pads the utterances of a batch as a peer does."""

    def __init__(self, stride: int, *, around_answer: bool) -> None:
        """Pad after the answer, or, as SLAM-LLM's collator does, so that all answers of a batch begin together.

        The latter pads on the left up to the longest prompt and on the right up to the longest answer.
        """
        self.stride, self.around_answer = stride, around_answer

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Return the batch."""
        frames_beh = nn.utils.rnn.pad_sequence([item.frames_eh for item in items], batch_first=True)
        short = -frames_beh.shape[1] % self.stride
        read = [len(item.before) + item.audio_tokens + len(item.after) for item in items]
        lefts = [max(read) - count if self.around_answer else 0 for count in read]
        ends = [left + count + len(item.answer) for left, count, item in zip(lefts, read, items, strict=True)]
        length = max(read) + max(len(item.answer) for item in items) if self.around_answer else max(ends)
        ids_bl = torch.full((len(items), length), PAD_ID)
        labels_bl = torch.full((len(items), length), IGNORED)
        mask_bl, audio_bl = (torch.zeros(len(items), length, dtype=torch.bool) for _ in range(2))
        for row, (item, left, end) in enumerate(zip(items, lefts, ends, strict=True)):
            begin = left + len(item.before)
            answer = slice(end - len(item.answer), end)
            ids_bl[row, left:begin] = torch.tensor(item.before)
            audio_bl[row, begin : begin + item.audio_tokens] = True
            ids_bl[row, begin + item.audio_tokens : answer.start] = torch.tensor(item.after)
            ids_bl[row, answer] = labels_bl[row, answer] = torch.tensor(item.answer)
            mask_bl[row, left:end] = True
        return Batch(
            frames_beh=nn.functional.pad(frames_beh, (0, 0, 0, short)),
            input_ids=ids_bl,
            attention_mask=mask_bl,
            is_audio=audio_bl,
            labels=labels_bl,
        )


class PeerModel(nn.Module):
    """Projector and language model with peft's own adapter, as both peers have them."""

    def __init__(self, made: Made, config: Config) -> None:
        """Copy the trained weights of ours; the frozen ones are the very tensors."""
        from peft import LoraConfig, get_peft_model

        super().__init__()
        lora, ours = config.lora, made.model.projector
        assert lora is not None
        assert isinstance(ours, ConvMlp)
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            lora_dropout=0.0,
            target_modules=list(lora.targets),
        )
        with warnings.catch_warnings():
            # peft asks transformers a question by its old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            self.lm = get_peft_model(sharing_copy(made.plain_lm), settings)
        self.conv = nn.Conv1d(ours.conv.in_channels, ours.conv.out_channels, ours.stride, ours.stride)
        self.hidden = nn.Linear(ours.hidden.in_features, ours.hidden.out_features)
        self.out = nn.Linear(ours.out.in_features, ours.out.out_features)
        self.to(next(made.plain_lm.parameters()).device)
        _copy(made.model.named_parameters(), self.trained())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, named as ours are."""
        return {_our_name(name): value for name, value in self.named_parameters() if value.requires_grad}

    def project(self, frames_beh: Tensor) -> Tensor:
        """Return vectors [b p d], of padding too (SLAM-LLM's ``cov1d-linear``, which is the published projector)."""
        hidden_bph = torch.relu(self.conv(frames_beh.transpose(1, 2))).transpose(1, 2)
        vectors_bpd: Tensor = self.out(torch.relu(self.hidden(hidden_bph)))
        return vectors_bpd


def _our_name(name: str) -> str:
    prefix = "lm.base_model.model."
    return f"lm_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else f"projector.{name}"


@torch.no_grad()
def _copy(ours: Iterator[tuple[str, nn.Parameter]], theirs: Mapping[str, nn.Parameter]) -> None:
    trained = {name: value for name, value in ours if value.requires_grad}
    assert trained.keys() == theirs.keys(), trained.keys() ^ theirs.keys()
    for name, value in theirs.items():
        value.copy_(trained[name])


class SlamModel(PeerModel):
    """The forward pass of SLAM-LLM's ``slam_model`` (src/slam_llm/models/slam_model.py, commit a68e78f)."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean loss and accuracy, both of all logits.

        Sounds are put into zeros an utterance at a time and added to the masked embeddings; the language model gets
        labels and makes logits at every position; their argmax is compared with the labels in every training step.
        """
        audio_bpd = self.project(batch["frames_beh"])
        is_audio_bl = batch["is_audio"]
        embeds_bld = self.lm.get_input_embeddings()(batch["input_ids"])
        starts, counts = is_audio_bl.float().argmax(dim=1), is_audio_bl.sum(dim=1)
        placed_bld = torch.zeros_like(embeds_bld)
        for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            placed_bld[row, start : start + count] = audio_bpd[row, :count].to(embeds_bld.dtype)
        embeds_bld = placed_bld + embeds_bld * ~is_audio_bl[..., None]
        labels_bl = batch["labels"]
        found = self.lm(inputs_embeds=embeds_bld, attention_mask=batch["attention_mask"], labels=labels_bl)
        with torch.no_grad():
            best_bl, wanted_bl = found.logits.argmax(-1)[:, :-1], labels_bl[:, 1:]
            asked_bl = wanted_bl != IGNORED
            accuracy = ((best_bl == wanted_bl) & asked_bl).sum() / asked_bl.sum()
        loss: Tensor = found.loss
        return loss, accuracy


class TrainerModel(PeerModel):
    """What a user hands to transformers' Trainer: the splice by ``masked_scatter``, as its own speech models do."""

    accepts_loss_kwargs = True  # the Trainer asks: its loss is then a sum over the batch's number of labels

    def forward(
        self,
        frames_beh: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        is_audio: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return what the causal language model does: loss and all logits."""
        audio_bpd = self.project(frames_beh)
        places = torch.arange(audio_bpd.shape[1], device=audio_bpd.device)
        is_real_bp = places < is_audio.sum(dim=1, keepdim=True)
        embeds_bld = self.lm.get_input_embeddings()(input_ids)
        embeds_bld = embeds_bld.masked_scatter(is_audio[..., None], audio_bpd[is_real_bp].to(embeds_bld.dtype))
        return self.lm(
            inputs_embeds=embeds_bld,
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
        )


class Peer:
    """What both peers are made of; `items` come in the order in which they are trained on."""

    def __init__(self, model: PeerModel, items: Items, collate: Collator, batch_size: int) -> None:
        """Keep the parts."""
        self.lm = model.lm.get_base_model()
        self.items, self.collate, self.batch_size = items, collate, batch_size
        self.trained = model.trained
        self.device: torch.device = self.lm.device
        self.on_gpu = self.device.type == "cuda"

    def batches(self) -> Iterator[Batch]:
        """Return the batches of a pass."""
        for batch in DataLoader(self.items, self.batch_size, collate_fn=self.collate, pin_memory=self.on_gpu):
            yield moved(batch, self.device)

    def autocast(self) -> torch.autocast:
        """Return the precision of the products: on a GPU bfloat16, as both have it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_gpu)


class SlamStyle(Peer):
    """SLAM-LLM's training loop (src/slam_llm/utils/train_utils.py; batches of 4, as its recipes have).

    One step a batch: AdamW, a linear schedule, no clipping, a progress bar that shows loss and accuracy of every step.
    Its validation and its start-up are left out.
    """

    name = "slam_style"

    def __init__(self, made: Made, config: Config, items: Items) -> None:
        """Make the model."""
        self.model = SlamModel(made, config)
        super().__init__(self.model, items, Collator(config.projector.stride, around_answer=True), SLAM_BATCH)
        self.peak_lr = config.train.peak_lr

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss: their mean times its number of labels."""
        with self.autocast():
            mean, _ = self.model(batch)
        summed: Tensor = mean * (batch["labels"] != IGNORED).sum()
        return summed

    def prepare(self, _folder: Path) -> Callable[[], object]:
        """Return what trains for one pass."""
        return self._train

    def _train(self) -> None:
        self.model.train()
        steps = math.ceil(len(self.items) / SLAM_BATCH)
        adam = torch.optim.AdamW(self.model.parameters(), lr=self.peak_lr, weight_decay=0.0)
        linear = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(0.0, 1 - step / steps))
        total_loss, total_accuracy = 0.0, 0.0
        with tqdm(total=steps, disable=None) as bar:
            for batch in self.batches():
                with self.autocast():
                    loss, accuracy = self.model(batch)
                total_loss += loss.detach().float()
                total_accuracy += accuracy
                loss.backward()
                adam.step()
                linear.step()
                adam.zero_grad()
                bar.update(1)
                bar.set_description(f"loss: {loss.detach().float()}, acc: {accuracy}")


class HfTrainer(Peer):
    """transformers' Trainer with its defaults: AdamW (fused), a linear schedule, clipping at 1; batches of 16."""

    name = "hf_trainer"

    def __init__(self, made: Made, config: Config, items: Items) -> None:
        """Make the model."""
        self.model = TrainerModel(made, config)
        super().__init__(self.model, items, Collator(config.projector.stride, around_answer=False), TRAINER_BATCH)
        self.peak_lr = config.train.peak_lr

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss: theirs, which is the sum over the number of labels, times that number."""
        count = (batch["labels"] != IGNORED).sum()
        with self.autocast():
            mean = self.model(**batch, num_items_in_batch=count).loss
        summed: Tensor = mean * count
        return summed

    def prepare(self, folder: Path) -> Callable[[], object]:
        """Return what trains for one pass.

        Raises:
            ConfigError: accelerate, which the Trainer needs, is not installed.
        """
        from transformers import PrinterCallback, Trainer, TrainingArguments

        try:
            arguments = TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=self.batch_size,
                num_train_epochs=1,
                learning_rate=self.peak_lr,
                train_sampling_strategy="sequential",  # of items that are in random order
                bf16=self.on_gpu,
                use_cpu=not self.on_gpu,
                dataloader_pin_memory=self.on_gpu,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
        except ImportError as error:
            fix = "run: pip install accelerate"
            raise ConfigError("bench", "transformers' Trainer needs the package accelerate", fix) from error
        trainer = Trainer(self.model, arguments, data_collator=self.collate, train_dataset=self.items)
        trainer.remove_callback(PrinterCallback)
        train: Callable[[], object] = trainer.train
        return train


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`."""
    return Batch(
        frames_beh=batch["frames_beh"].to(device),
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        is_audio=batch["is_audio"].to(device),
        labels=batch["labels"].to(device),
    )
