"""What a multimodal LLM writes about open images: the text of MLLM-FL's global visual-text pretraining.

    each image x each prompt  ->  a line of a jsonl  ->  kept or dropped, by counts of words  ->  examples to train on

A writer is what a yaml of conf/captions/ names: the host's own LLM, another of a hub, texts made elsewhere, or the
data's own answers, which are an oracle and say so in their name. Who writes is in every line; nothing is asked twice.
Source: MLLM-FL (arXiv 2409.06067), where an MLLM writes a description, a conversation and reasoning about each image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from fedmm import tree
from fedmm.bounds import Count
from fedmm.edge.prepare import Processor, content_of, encode, prepare
from fedmm.evaluate.answers import answers
from fedmm.model import Model
from fedmm.stages.caption_records import WANTED, Caption, append, keep, lines_of, resume
from fedmm.stages.fingerprint import fingerprint, reads
from fedmm.types import IMAGE_PLACE, Example, ReadPath

NOTED_CHUNKS = 20
OWN_QUESTION = "{question}"
"""Where an example's own question stands in a prompt."""


@dataclass(frozen=True)
class Writer:
    """Who writes. `name` changes with all that the text depends on; `say` gets examples that hold the prompt as their
    question, and an answer only where that is the data's own question."""

    name: str
    say: Callable[[Sequence[Example]], list[str]]


@dataclass(frozen=True)
class Captions:
    """What came of it: examples to train on, the captions they are made of, how many were dropped, by reason."""

    examples: list[Example]
    used: list[Caption]
    dropped: dict[str, int]


# parameters: each after * is a setting of conf/captions/; those before are what a stage is given
def captions(
    model: Model,
    processor: Processor,
    prompt: str,
    examples: Sequence[Example],
    path: Path,
    noted: Callable[[str], None] | None = None,
    *,
    writer: Callable[[Model, Processor, str], Writer],
    prompts: Sequence[str],
    chunk: Count = 64,
    min_words: int = 1,
    max_words: int = 60,
    repetition: float = 0.5,
    agree: Sequence[Sequence[str]] = (),
) -> Captions:
    """`write`, `keep` and `training` in a row; a node of conf/captions/ gives this with everything behind `*`.

    `model`, `processor` and `prompt` are the host's own, and `path` the jsonl; `noted` hears how far it is.
    """
    said = write(examples, writer(model, processor, prompt), prompts, path, noted, chunk=chunk)
    used, dropped = keep(said, min_words=min_words, max_words=max_words, repetition=repetition, agree=agree)
    return Captions(training(used, examples), used, dropped)


def write(
    examples: Sequence[Example],
    writer: Writer,
    prompts: Sequence[str],
    path: Path,
    noted: Callable[[str], None] | None = None,
    *,
    chunk: int = 64,
) -> list[Caption]:
    """Ask every prompt of every image, once; examples without images are passed over.

    `path` gets a line for each as it comes, in chunks whose bounds do not depend on what is there already, so that a
    killed run goes on where it stopped and ends with the same texts. Lines of other writers or prompts stay. The order
    is that of the images, and for each that of the prompts. Raises ValueError for a line that is no caption.
    """
    asked = list(_asked(examples, prompts))
    there = {(c.image, c.prompt): c for c in resume(path) if c.writer == writer.name}
    append(path, [])  # now: what cannot be kept is not asked for
    for start in range(0, len(asked), chunk):
        new = [one for one in asked[start : start + chunk] if (one.image, one.prompt) not in there]
        if not new:
            continue
        texts = writer.say([_example(examples[one.row], one.prompt) for one in new])
        made = [Caption(a.image, a.prompt, t, writer.name) for a, t in zip(new, texts, strict=True)]
        append(path, made)
        there |= {(caption.image, caption.prompt): caption for caption in made}
        if noted and start // chunk % NOTED_CHUNKS == 0:
            noted(f"{len(there)} texts of {len(asked)} about open images are in {path}")
    return [there[one.image, one.prompt] for one in asked]


def training(captions: Sequence[Caption], examples: Sequence[Example]) -> list[Example]:
    """Examples that ask the prompt and want the text. Raises ValueError for a caption whose image is not there."""
    rows: dict[str, int] = {}
    for row, example in enumerate(examples):
        rows.setdefault(content_of(example.images), row)
    made = {}
    for caption in dict.fromkeys(captions):
        if caption.image not in rows:
            raise ValueError(
                f"a caption is about image {caption.image}, which is none of the {len(examples)} examples; give those "
                "that it was written for"
            )
        source = examples[rows[caption.image]]
        about = f"{caption.image}\n{caption.prompt}\n{caption.writer}"
        id = f"caption/{hashlib.blake2b(about.encode(), digest_size=12).hexdigest()}"
        if id in made:
            raise ValueError(
                f"{source.id}: two texts of {caption.writer} for {caption.prompt!r}; leave one of them out"
            )
        labels = {"source": source.id, "writer": caption.writer}
        made[id] = Example(id, source.images, caption.prompt, caption.text, labels)
    return list(made.values())


# --- writers ----------------------------------------------------------------------------------------------------------


def by_host(model: Model, processor: Processor, prompt: str, *, batch_size: int = 64, max_tokens: int = 8) -> Writer:
    """The host's own LLM with no adapters in use: greedy answers."""

    def say(asked: Sequence[Example]) -> list[str]:
        items = encode(model.edge, prepare(asked, processor, prompt))  # an image of several prompts is encoded once
        found = answers(model, items, processor.tokenizer, use=(), batch_size=batch_size, max_tokens=max_tokens)
        return [answer.said for answer in found]

    return Writer(f"own:{fingerprint(model, processor, prompt)[:16]}:{max_tokens}", say)


# parameters: each after * is a setting of conf/captions/hub.yaml
def hub(
    model: Model,
    processor: Processor,
    prompt: str,
    *,
    path: ReadPath,
    template: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: str = "auto",
    batch_size: int = 8,
    max_tokens: int = 128,
) -> Writer:
    """Another image-text-to-text model of Hugging Face's, by hub name or folder: greedy answers.

    It is asked by its processor's chat template; `template`, with `{question}` and as many image placeholders as there
    are images, is for one that has none, and wins where both are there. The host's own LLM is not used.
    Raises ValueError where there is neither, OSError where `path` holds no model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asks = AutoProcessor.from_pretrained(path)
    chat = getattr(asks, "chat_template", None)
    if not (template or chat):
        raise ValueError(
            f"captions.writer.path={path} has no chat template; set captions.writer.template, for instance to "
            "'USER: <image>\\n{question} ASSISTANT:'"
        )
    asks.tokenizer.padding_side = "left"  # an answer goes on from where its prompt ends
    if asks.tokenizer.pad_token is None:
        asks.tokenizer.pad_token = asks.tokenizer.eos_token
    writes = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()

    @torch.inference_mode()
    def say(asked: Sequence[Example]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(asked), batch_size):
            inputs = _inputs(asks, asked[start : start + batch_size], template).to(device, writes.dtype)
            out_BN = writes.generate(
                **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_tokens
            )
            new_BN = out_BN[:, inputs["input_ids"].shape[1] :]
            texts += asks.tokenizer.batch_decode(new_BN, skip_special_tokens=True)
        return [text.strip() for text in texts]

    weights = tree.digest({**dict(writes.named_parameters()), **dict(writes.named_buffers())})
    about = f"{weights} {template or chat} {max_tokens} {reads(asks.tokenizer, asks.image_processor)}"
    return Writer(f"hub:{path}:{hashlib.sha256(about.encode()).hexdigest()[:16]}", say)


def prepared_files(folder: str) -> list[Path]:
    """Where prepared texts lie. Raises ValueError where there is none."""
    if files := sorted(Path(folder).glob("*.jsonl")):
        return files
    raise ValueError(
        f"captions.writer.folder={folder} has no *.jsonl; prepare texts there, a line {WANTED}, or set captions=own"
    )


def prepared(model: Model, processor: Processor, prompt: str, *, folder: ReadPath) -> Writer:
    """Texts made elsewhere, by a commercial model or by people: every *.jsonl of a folder, with lines of

        {"image": <its content hash, or the example's id>, "prompt": <as it is asked>, "text": <what was written>}

    An empty text says that there is none, and `keep` drops it. A jsonl of `write` is one, too. Raises ValueError for a
    broken line, for two texts of one image and prompt that differ, and when asked what no line has.
    """
    files = prepared_files(folder)
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    for file in files:
        for where, line in lines_of(file, file.read_bytes().split(b"\n"), ("image", "prompt", "text")):
            text, first = texts.setdefault((line["image"], line["prompt"]), (line["text"], where))
            if text != line["text"]:
                raise ValueError(f"{where} says {line['text'][:60]!r} where {first} says {text[:60]!r}; leave one out")

    def say(asked: Sequence[Example]) -> list[str]:
        found = []
        for example in asked:
            image = content_of(example.images)
            text = texts.get((image, example.question)) or texts.get((example.id, example.question))
            if text is None:
                raise ValueError(
                    f"captions.writer.folder={folder} has no text of image {image} (example {example.id}) for "
                    f"the prompt {example.question!r}; add a line, with an empty text where there is none, or change "
                    "captions.prompts"
                )
            found.append(text[0])
        return found

    total = hashlib.sha256(json.dumps(sorted((*key, text) for key, (text, _) in texts.items())).encode())
    return Writer(f"prepared:{total.hexdigest()[:16]}", say)


def oracle(model: Model, processor: Processor, prompt: str) -> Writer:
    """The data's own answers to its own questions: an upper bound, and no MLLM. It asks `{question}` alone."""

    def say(asked: Sequence[Example]) -> list[str]:
        if other := [example.question for example in asked if not example.answer]:
            raise ValueError(
                f"captions=oracle knows the answers of the data's own questions alone, got {other[0]!r}; set "
                f"captions.prompts=['{OWN_QUESTION}']"
            )
        return [example.answer for example in asked]

    return Writer("oracle", say)


def _inputs(asks: Any, examples: Sequence[Example], template: str | None) -> Any:
    """What a model of a hub takes, by its own processor."""
    options = {"padding": True, "return_tensors": "pt"}
    if template:
        texts = [template.format(question=example.question) for example in examples]
        return asks(images=[image for example in examples for image in example.images], text=texts, **options)
    talks = [[{"role": "user", "content": _content(example)}] for example in examples]
    options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return asks.apply_chat_template(talks, **options)


def _content(example: Example) -> list[dict[str, Any]]:
    """A question with its images, those without a place in it first."""
    first, *rest = example.question.split(IMAGE_PLACE)
    front = len(example.images) - len(rest)
    if front < 0:
        raise ValueError(f"{example.id}: {len(rest)} places for {len(example.images)} images in {example.question!r}")

    def shown(images: Sequence[Image.Image], text: str) -> list[dict[str, Any]]:
        said = [{"type": "text", "text": text.strip()}] if text.strip() else []
        return [*({"type": "image", "image": image} for image in images), *said]

    content = shown(example.images[:front], first)
    for image, text in zip(example.images[front:], rest, strict=True):
        content += shown([image], text)
    return content


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    row: int
    image: str
    prompt: str


def _asked(examples: Sequence[Example], prompts: Sequence[str]) -> Iterator[_Asked]:
    if not prompts:
        raise ValueError("captions.prompts is empty; give what to ask of each image, '{question}' is the example's own")
    seen = set()
    for row, example in enumerate(examples):
        image = content_of(example.images)
        for prompt in prompts if example.images else ():
            one = image, prompt.replace(OWN_QUESTION, example.question)
            if one not in seen:
                seen.add(one)
                yield _Asked(row, *one)


def _example(example: Example, prompt: str) -> Example:
    return replace(example, question=prompt, answer=example.answer if prompt == example.question else "")
