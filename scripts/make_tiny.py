"""Build the embedded model: a LLaVA of 1.2M parameters that reads digits and answers questions in its own words.

    python scripts/make_tiny.py --seed 0      # writes fedmm/assets/tiny_llava

Four stages, all on open digits (print and pen, see fedmm/data/glyphs.py); no handwritten glyph is ever trained on:
  1. the tower learns which digit and which colour lies under each patch;
  2. the whole model learns to answer font questions in its own words, the patches still asked in passing;
  3. it practises what it is still bad at;
  4. the weights, rounded to fp16 after stages 2 and 3, are scored and packed as text with a card.
The words of the clients' languages are tokens of the table that no training text holds: they keep their random start.
Nothing is written before the end. The same seed on the same machine with the same threads gives the same bits.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fedmm.data.glyphs import Glyphs, open_digits
from fedmm.data.scene_plans import (
    ASKED,
    COLOURS,
    KINDS,
    SIDE,
    SIDES,
    SITES,
    VOCABULARIES,
    Plan,
    ask,
    plan_scenes,
)
from fedmm.data.scenes import draw, scenes
from fedmm.llm.packing import pack
from fedmm.types import IGNORE, Example

PATCH = 8
GRID = SIDE // PATCH
PROMPT = "<image> {question}"
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
NUMBERS = tuple(str(number) for number in range(18))  # the largest sum of two different digits is 17
PRACTICE = (*KINDS, *2 * ("compare", "name"))  # what stage 2 leaves at chance: larger side, colour of a digit
FOREIGN = tuple(word for words in VOCABULARIES.values() for word in words.values())
WORDS = (*SPECIALS, *NUMBERS, *dict.fromkeys((*ASKED, *SIDES, *COLOURS)), *FOREIGN)


def main() -> None:
    args = _arguments()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model, processor = build()
    feed = Feed(args.seed, args.glyphs)
    teach_tower(model, feed, steps=args.tower_steps, batch=args.batch)
    teach_answers(model, feed, steps=args.steps, batch=args.batch)
    round_to_half(model)
    practise(model, Feed(args.seed + 1, args.glyphs, PRACTICE), steps=args.practice_steps, batch=args.batch)
    round_to_half(model)
    seconds = time.perf_counter() - started
    scores = figures(model, processor)
    store(model, args, seconds, scores)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="fixed, as the order of sums depends on it")
    parser.add_argument("--glyphs", type=int, default=40_000, help="open digits to draw scenes from")
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--practice-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "fedmm" / "assets" / "tiny_llava")
    return parser.parse_args()


# --- the model ------------------------------------------------------------------------------------------------------


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor, both of the ordinary classes."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=WORDS.index("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = LlavaForConditionalGeneration(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)  # rows of norm 1.1, where training leaves them too
    return model, _processor()


def _processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


# --- what it sees ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """One batch of scenes, with what lies under each patch and with a question each."""

    pixels_BCHW: Tensor
    digits_BP: Tensor  # 10 where there is none
    colours_BP: Tensor
    tokens_BT: Tensor
    labels_BT: Tensor


class Feed:
    """Endless fresh open scenes, drawn 64 batches at a time from one bank of bent digits."""

    def __init__(self, seed: int, glyphs: int, kinds: Sequence[str] = KINDS):
        self.bank: Glyphs = open_digits(glyphs, torch.Generator().manual_seed(seed))
        self.rng = np.random.default_rng([seed, 7])
        self.kinds = kinds
        self.rows = {word: row for row, word in enumerate(WORDS)}

    def batches(self, steps: int, batch: int) -> Iterator[Lesson]:
        for start in range(0, steps, 64):
            many = min(64, steps - start)
            plan = plan_scenes(self.rng, many * batch, self.bank, ("plain",), self.kinds)
            pictures = torch.from_numpy(draw(self.rng, plan, self.bank))
            digits, colours = under_patches(plan)
            tokens, labels = self._texts(plan)
            for step in range(many):
                rows = slice(step * batch, (step + 1) * batch)
                pixels = self._scanned(pictures[rows].permute(0, 3, 1, 2).float() / 255)
                yield Lesson(2 * pixels - 1, digits[rows], colours[rows], tokens[rows], labels[rows])

    def _scanned(self, pixels: Tensor) -> Tensor:
        """Half of the scenes each blurred, exposed otherwise, noisy: so that no site's scanner is a surprise."""
        count = len(pixels)
        draws = torch.from_numpy(self.rng.random((5, count, 1, 1, 1), dtype=np.float32))
        often = torch.from_numpy(self.rng.random((3, count, 1, 1, 1)) < 0.5)
        soft = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
        pixels = torch.where(often[0], torch.lerp(pixels, soft, 0.8 * draws[0]), pixels)
        pixels = torch.where(often[1], (0.6 + 0.5 * draws[1]) * pixels + 0.25 * draws[2] - 0.05, pixels)
        grain = torch.from_numpy(self.rng.standard_normal(pixels.shape, dtype=np.float32))
        return torch.where(often[2], pixels + 0.08 * draws[3] * grain, pixels).clamp(0, 1)

    def _texts(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """`<s> <image>*36 question answer </s>`, right-padded; only answer and end are to be learnt."""
        pairs = [ask(plan, row) for row in range(len(plan.kinds))]
        asked = [[self.rows[word] for word in question.split()] for question, _ in pairs]
        said = [[*(self.rows[word] for word in answer.split()), self.rows["</s>"]] for _, answer in pairs]
        head = [self.rows["<s>"], *[self.rows["<image>"]] * GRID**2]
        longest = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
        tokens = np.full((len(pairs), len(head) + longest), self.rows["<pad>"])
        labels = np.full(tokens.shape, IGNORE)
        tokens[:, : len(head)] = head
        for row, (question, answer) in enumerate(zip(asked, said, strict=True)):
            start = len(head) + len(question)
            tokens[row, len(head) : start] = question
            tokens[row, start : start + len(answer)] = answer
            labels[row, start : start + len(answer)] = answer
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def under_patches(plan: Plan) -> tuple[Tensor, Tensor]:
    """Digit and colour under the middle of each patch, (N, 36); 10 and 6 where there is paper."""
    axis = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    x, y = np.tile(axis, GRID), np.repeat(axis, GRID)
    digits = np.full((len(plan.kinds), GRID**2), 10)
    colours = np.full(digits.shape, len(COLOURS))
    half = plan.sizes / SIDE
    for slot in range(plan.digits.shape[1]):
        wide = np.abs(x - plan.centres[:, slot, :1]) < 0.7 * half[:, slot, None]
        high = np.abs(y - plan.centres[:, slot, 1:]) < half[:, slot, None]
        inside = wide & high & (plan.shown > slot)[:, None]
        digits = np.where(inside, plan.digits[:, slot, None], digits)
        colours = np.where(inside, plan.colours[:, slot, None], colours)
    return torch.from_numpy(digits), torch.from_numpy(colours)


# --- teaching -------------------------------------------------------------------------------------------------------


def teach_tower(model: LlavaForConditionalGeneration, feed: Feed, *, steps: int, batch: int) -> None:
    """Stage 1: digit and colour of every patch, read off what the connector makes of it by two linear heads.

    Heads on the tower alone let the connector drop the colours (1% of its variance), and no colour was ever learnt.
    """
    model.patch_heads = nn.ModuleList([nn.Linear(128, 11), nn.Linear(128, len(COLOURS) + 1)])
    optimizers = _optimizers([model.model.vision_tower, model.model.multi_modal_projector, model.patch_heads])
    for step, lesson in enumerate(_scheduled(optimizers, feed, steps, batch, "tower")):
        _update(optimizers, _patch_loss(model, _seen(model, lesson), lesson), step, "tower")


def teach_answers(model: LlavaForConditionalGeneration, feed: Feed, *, steps: int, batch: int) -> None:
    """Stage 2: cross-entropy of the answer's words, and a third of the patches' loss, which keeps the tower reading."""
    optimizers = _optimizers([model.model.language_model, model.lm_head])
    optimizers += _optimizers(
        [model.model.vision_tower, model.model.multi_modal_projector, model.patch_heads], share=0.4
    )
    for step, lesson in enumerate(_scheduled(optimizers, feed, steps, batch, "answers")):
        seen = _seen(model, lesson)
        loss = _answer_loss(model, seen, lesson)
        _update(optimizers, loss + 0.33 * _patch_loss(model, seen, lesson), step, "answers", answer_loss=loss.item())
    del model.patch_heads


def practise(model: LlavaForConditionalGeneration, feed: Feed, *, steps: int, batch: int) -> None:
    """Stage 3: the answer's words alone, from a feed that asks more of what is learnt last; the tower hardly moves."""
    optimizers = _optimizers([model.model.language_model, model.model.multi_modal_projector, model.lm_head], share=0.6)
    optimizers += _optimizers([model.model.vision_tower], share=0.1)
    for step, lesson in enumerate(_scheduled(optimizers, feed, steps, batch, "practice")):
        _update(optimizers, _answer_loss(model, _seen(model, lesson), lesson), step, "practice")


def _answer_loss(model: LlavaForConditionalGeneration, seen_BPD: Tensor, lesson: Lesson) -> Tensor:
    embeds = model.get_input_embeddings()(lesson.tokens_BT)
    embeds = torch.cat([embeds[:, :1], seen_BPD, embeds[:, 1 + GRID**2 :]], 1)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    labels = lesson.labels_BT[:, 1:]
    told = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[told]), labels[told])


def _seen(model: LlavaForConditionalGeneration, lesson: Lesson) -> Tensor:
    """The image tokens as the LLM gets them, (B, 36, 128)."""
    features = model.model.vision_tower(lesson.pixels_BCHW).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(features)


def _patch_loss(model: nn.Module, seen_BPD: Tensor, lesson: Lesson) -> Tensor:
    digits, colours = (head(seen_BPD).flatten(0, 1) for head in model.patch_heads)
    return F.cross_entropy(digits, lesson.digits_BP.flatten()) + F.cross_entropy(colours, lesson.colours_BP.flatten())


def _optimizers(modules: Sequence[nn.Module], share: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for tables, heads and vectors; rates times `share`.

    Muon reached in 250 steps of stage 1 what AdamW alone, at the best of four rates, reached in about 600. No decay:
    a row of the token table that no text holds stays where it started.
    """
    named = [pair for module in modules for pair in module.named_parameters()]
    inner = {name: p for name, p in named if p.dim() == 2 and ("layers" in name or "linear" in name)}
    outer = [p for name, p in named if name not in inner]
    return [
        torch.optim.Muon(inner.values(), lr=share * 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=share * 2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _scheduled(
    optimizers: Sequence[torch.optim.Optimizer], feed: Feed, steps: int, batch: int, what: str
) -> Iterator[Lesson]:
    """The feed's batches, the rate set before each: a twentieth to warm up, then a half cosine to nothing."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    started = time.perf_counter()
    for step, lesson in enumerate(feed.batches(steps, batch)):
        part = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * part
        yield lesson
        if step % 100 == 99:
            print(f"{what} {step + 1}/{steps}, {(time.perf_counter() - started) / (step + 1):.3f} s a step", flush=True)


def _update(optimizers: Sequence[torch.optim.Optimizer], loss: Tensor, step: int, what: str, **shown: float) -> None:
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    if step % 100 == 99:
        print(what, f"loss {loss.item():.4f}", *(f"{name} {value:.4f}" for name, value in shown.items()), flush=True)


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())


# --- scores and storage ---------------------------------------------------------------------------------------------


def figures(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, dict[str, float]]:
    """Exact match by kind, on fresh open scenes and on the validation split's handwriting. Test stays unseen."""
    sites = [name for name in SITES if name != "plain"]
    asked = [("plain", "english"), ("plain", "finnish")]
    asked += [(style, SITES[style].vocabulary) for style in sites] + [(style, "english") for style in sites]
    fresh = scenes(seed=10_001, train=0, validation=0, test=0, public=2000)["public"]
    rows = {"open digits, english": accuracy(model, processor, fresh)}
    for style, vocabulary in asked:
        made = scenes(seed=10_001, train=0, validation=1000, test=0, styles=(style,), vocabulary=vocabulary)
        rows[f"handwriting, {style}, {vocabulary}"] = accuracy(model, processor, made["validation"])
    return rows


@torch.no_grad()
def accuracy(model: nn.Module, processor: LlavaProcessor, examples: Sequence[Example]) -> dict[str, float]:
    """Share of answers whose every word and end is the likeliest next one, in all and by kind."""
    model.eval()
    right: dict[str, list[bool]] = {"all": []}
    for start in range(0, len(examples), 250):
        some = examples[start : start + 250]
        texts = [f"{PROMPT.format(question=e.question)} {e.answer} </s>" for e in some]
        images = [e.images[0] for e in some]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
        best = model(**batch).logits.argmax(-1)
        ends = batch["attention_mask"].sum(1)
        for row, example in enumerate(some):
            answer = slice(ends[row] - len(example.answer.split()) - 1, ends[row])
            same = best[row, answer.start - 1 : answer.stop - 1].equal(batch["input_ids"][row, answer])
            right["all"].append(same)
            right.setdefault(example.labels["kind"], []).append(same)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def store(model: nn.Module, args: argparse.Namespace, seconds: float, scores: dict) -> None:
    """Pack the checkpoint and write its card; everything appears at once, at the end."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as aside:
        model.half().save_pretrained(f"{aside}/plain")
        _processor().save_pretrained(f"{aside}/plain")  # a used one would store how it last padded
        config = Path(aside, "plain", "config.json")
        config.write_text(config.read_text().replace('"float16"', '"float32"'))  # fp16 is how it is stored, not run
        pack(Path(aside, "plain"), Path(aside, "packed"))
        Path(aside, "packed", "README.md").write_text(card(model, args, seconds, scores))
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.move(f"{aside}/packed", args.out)


def card(model: nn.Module, args: argparse.Namespace, seconds: float, scores: dict) -> str:
    kinds = ("all", *KINDS)
    lines = [" | ".join([name, *(f"{row[kind]:.3f}" for kind in kinds)]) for name, row in scores.items()]
    table = "\n".join(f"| {line} |" for line in lines)
    named = ("seed", "threads", "glyphs", "tower_steps", "steps", "practice_steps", "batch")
    settings = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in named)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"""# tiny_llava

An ordinary `LlavaForConditionalGeneration` of {count:,} parameters: CLIP tower 96 wide, 4 layers, 48x48 pixels in
patches of 8 (36 image tokens); Llama 128 wide, 4 layers, {len(WORDS)} words, head not tied. Its weights are
`weights.jsonl`, one fp16 tensor a line; `fedmm.llm.packing.unpack` makes an ordinary checkpoint of it.

It was taught on open digits only (matplotlib's fonts and a pen that follows skeletons, bent and put through an 8x8
raster): first the tower to tell digit and colour under each patch, then the whole to answer questions in its own words.
It has never seen a handwritten glyph, and the words of the client languages ({len(FOREIGN)} tokens) stood in no text.

    python scripts/make_tiny.py {settings}

took {seconds:.0f} s on two cores, PyTorch {torch.__version__}.

## Scores

Exact match after rounding to fp16, {date.today().isoformat()}: 2,000 fresh open scenes, 1,000 handwritten ones each
(validation glyphs; the test split was not looked at). "plain" has the model's own colours, "english" are its own
words; the others are sites of `fedmm/data/scene_plans.py`, with their palettes and scanners, asked with their own
words but for those that `KEPT` names there.

| scenes | {" | ".join(kinds)} |
|---|{"---|" * len(kinds)}
{table}
"""


if __name__ == "__main__":
    main()
