"""The `chat` verb: lines in, answers out, word by word where the model writes; base and tuned side by side on request.

Knows predictors and what a model can do (`generate`), never which task it learned. Every line stands alone: no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewright import find
from tunewright.contracts import Loaded, Method, Record, Task
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import predict_rows
from tunewright.errors import UserError
from tunewright.models.generation import room
from tunewright.runs.prediction import Predictor, is_whole, open_run, single_record

NEW_TOKENS = 256  # a paragraph or two; more costs time and rarely says more
Write = Callable[[str], object]


@dataclass(frozen=True)
class Speaker:
    """One of the models that answer."""

    name: str  # "tuned" or "base"
    model: Callable[[], AbstractContextManager[nn.Module]]
    loaded: Loaded


def chat(
    run: Path,
    lines: Iterable[str],
    *,
    write: Write,
    say: Write,
    side_by_side: bool = False,
    max_new_tokens: int = NEW_TOKENS,
    base: str | None = None,
) -> Iterator[dict[str, Any]]:
    """An answer to each line until an empty one: {"prompt", "tuned": ..., "base": ...}; one that cannot be: "error".

    write: gets the answers piece by piece as they are made.   say: gets what is said beside them.
    """
    predictor = open_run(run, base)
    speakers = [Speaker("tuned", lambda: contextlib.nullcontext(predictor.model), predictor.loaded)]
    if side_by_side and (other := _base_of(predictor, is_whole(run / "model"), base, say)):
        speakers.insert(0, other)
    say(_greeting(predictor))
    for line in lines:
        prompt = line.strip()
        if not prompt:
            return
        try:
            record = single_record(predictor.task, prompt)
        except UserError as error:  # a picture that is not there: the next line may name one
            say(error.text())
            yield {"prompt": prompt, "error": error.as_dict()}
            continue
        found: dict[str, Any] = {"prompt": prompt}
        for speaker in speakers:
            write(f"{speaker.name}: " if len(speakers) > 1 else "")
            with speaker.model() as model:
                found[speaker.name] = _answer(predictor, model, speaker.loaded, record, max_new_tokens, write)
            write("\n")
        yield found


def writes(model: nn.Module) -> bool:
    """Whether a model answers in words of its own."""
    able = getattr(model, "can_generate", None)
    return bool(callable(able) and able())


def _greeting(predictor: Predictor) -> str:
    kind = next(field for field in predictor.task.fields.values() if field.kind != "label").help
    return f"One line each: {kind}. Every line stands alone. An empty line ends."


def _base_of(predictor: Predictor, whole: bool, place: str | None, say: Write) -> Speaker | None:
    """The base: the tuned model with its additions off, or loaded beside it; None where it has no answer of its own."""
    recipe = predictor.recipe
    method: Method = find.build("methods", recipe.method.name, recipe.method.options, Method)  # type: ignore[type-abstract]
    loaded = predictor.loaded
    if whole or not method.keeps_base:
        from dataclasses import replace

        spec = replace(recipe.model, checkpoint=place) if place else recipe.model
        loaded = predictor.task.load(spec, predictor.loaded.labels)
    if loaded.fresh:
        say(f"The base has no {', '.join(loaded.fresh)} of its own, so it has no answer to show; tuned alone answers.")
        return None
    if method.keeps_base and not whole:
        return Speaker("base", lambda: method.reference(predictor.model, None), loaded)
    device = next(predictor.model.parameters()).device
    beside = loaded.model.to(device).eval()
    return Speaker("base", lambda: contextlib.nullcontext(beside), loaded)


def _answer(predictor: Predictor, model: nn.Module, loaded: Loaded, record: Record, most: int, write: Write) -> Any:
    """The text that a writing model gives, streamed; or the prediction, its label and score written."""
    task = predictor.task
    if writes(model):
        return {"text": stream(task, model, loaded, record, most, write)}
    answer = predict_rows(task, model, loaded, Examples([record], lambda r: task.encode(r, loaded, target=False)))[0]
    shown = f"{answer['label']}  {answer['score']:.3f}" if "label" in answer else str(answer)
    write(shown)
    return answer


def stream(task: Task, model: nn.Module, loaded: Loaded, record: Record, most: int, write: Write) -> str:
    """The likeliest continuation, token by token, until the end token or `most` tokens; what was written."""
    from transformers import GenerationConfig, TextStreamer

    pieces: list[str] = []

    class Pieces(TextStreamer):
        """Words as soon as they are whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    tokenizer = loaded.processor
    example = task.encode(record, loaded, target=False)
    prompt = example["prompt_ids"] if "prompt_ids" in example else example["input_ids"]
    prompt = prompt.unsqueeze(0).to(next(model.parameters()).device)
    ends = loaded.helpers.get("ends") or [tokenizer.eos_token_id]
    # as models/generation.py has it, so that chat says what predict says; there answers are made many at once
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=room(model, tokenizer, prompt.shape[1], most), use_cache=True,
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        repetition_penalty=1.0, no_repeat_ngram_size=0,
    )  # fmt: skip
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
    return "".join(pieces).strip()
