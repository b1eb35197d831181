"""A base in few bits: the published levels, the bits, what stays whole, and that training and opening keep it so."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import same_answers
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Callback, Method, Task
from tunewright.errors import MethodError, ModelError, UserError
from tunewright.models import quantize, tiny
from tunewright.models.load import open_checkpoint
from tunewright.models.surgery import count_parameters
from tunewright.recipe import ModelSpec
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")

# Dettmers et al. 2023 (QLoRA), appendix E: the 16 quantiles of a normal distribution, scaled to -1 and 1
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
TASKS = ["text-classification", "sft"]


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes by itself repacks weights, in tiles of 64


def few(recipe, kind):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, quantize=kind))


@pytest.fixture
def quantized(tiny_recipe, tmp_path_factory):
    bases = {}

    def make(task="text-classification", kind="nf4", method="lora", **keys):
        recipe = tiny_recipe(task, method=method, **keys)
        if task not in bases:
            maker = tiny.MAKERS[find.find("tasks", task, Task).auto_class]
            bases[task] = str(maker(tmp_path_factory.mktemp("wide"), **WIDE))
        return few(dataclasses.replace(recipe, model=ModelSpec(bases[task])), kind)

    return make


def layers(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ in quantize.KINDS}


def stored(matrix: torch.Tensor) -> torch.nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(*reversed(matrix.shape), bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(matrix.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu")


def test_the_sixteen_levels_are_the_published_ones():
    """A block of 64 whose largest weight is 1 comes back as levels of the table, and zero as zero."""
    spread = torch.linspace(-1, 1, 64).repeat(64, 1)
    levels = torch.unique(quantize.matrix(stored(spread)))
    scale = levels.abs().max()  # the constant itself is kept in 8 bits
    assert len(levels) == 16
    assert (levels / scale - torch.tensor(NF4)).abs().max() < 1e-3
    assert scale == pytest.approx(1.0, abs=5e-3)
    assert quantize.matrix(stored(torch.zeros(64, 64))).abs().max() == 0


def test_a_normal_weight_loses_less_than_in_evenly_spaced_levels():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    error = (quantize.matrix(stored(weight)) - weight).square().mean()
    blocks = weight.reshape(-1, 64)
    top = blocks.abs().amax(1, keepdim=True)
    even = ((blocks / top * 7).round() / 7 * top - blocks).square().mean()
    assert error < 0.9 * even
    assert error < 0.012, "published order of size for a standard normal weight"


def test_a_weight_takes_four_bits_and_an_eighth():
    layer = stored(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    state = layer.weight.quant_state
    parts = [layer.weight, state.absmax, state.state2.absmax]
    bits = 8 * sum(t.numel() * t.element_size() for t in parts) / 1024**2
    assert bits == pytest.approx(4.127, abs=2e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("task", TASKS)
def test_only_matrices_in_blocks_are_stored_in_few_bits(quantized, task, kind):
    _, loaded = checking.load(checking.prepare(quantized(task, kind)))
    found = layers(loaded.model)
    assert set(found) == set(loaded.layout.attention) | set(loaded.layout.mlp)
    assert all(p.dtype == torch.float32 for n, p in loaded.model.named_parameters() if "embed" in n or "head" in n)
    plain = checking.load(checking.prepare(few(quantized(task), None)))[1]
    assert count_parameters(loaded.model)[1] == count_parameters(plain.model)[1], "two weights a byte are two weights"
    (said,) = [note for note in loaded.notes if "stored as" in note]
    assert said.startswith(f"{len(found)} matrices")
    assert said.index(f"stored as {kind}") < said.index("norms and the head are stored as float32: ")


class Pulled(Exception):
    pass


class Watch(Callback):
    def __init__(self, plug=0):
        self.plug, self.losses = plug, []

    def on_start(self, state, model):
        self.before = {n: m.weight.data.clone() for n, m in layers(model).items()}
        self.grads = []

    def on_step(self, state, logs):
        self.losses.append(logs["loss"])
        if state.step == self.plug:
            raise Pulled

    def on_end(self, state, model):
        self.same = all(torch.equal(m.weight.data, self.before[n]) for n, m in layers(model).items())
        self.trained = [p.dtype for p in model.parameters() if p.requires_grad]


LONG = {"num_train_epochs": 12, "learning_rate": 1e-2, "logging_steps": 1, "precision": "float32"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("task", TASKS)
def test_it_learns_and_the_base_keeps_every_bit(quantized, tmp_path, task, kind):
    watch = Watch()
    run = train(quantized(task, kind, train=LONG), tmp_path / "run", callbacks=[watch], quiet=True, say=lambda t: None)
    epoch = len(watch.losses) // 12
    assert sum(watch.losses[-epoch:]) < 0.95 * sum(watch.losses[:epoch])
    assert watch.same
    assert watch.before
    assert set(watch.trained) == {torch.float32}
    assert not (run.path / "model" / "config.json").read_text().count("quantization_config")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_ends_with_the_same_bytes(quantized, tmp_path, kind):
    recipe = quantized(kind=kind, train={"max_steps": 9, "save_steps": 2, "precision": "float32", "logging_steps": 1})
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "stopped", callbacks=[Watch(5)], quiet=True, say=lambda t: None)
    runs = [train(recipe, tmp_path / name, quiet=True, say=lambda t: None) for name in ("stopped", "straight")]
    one, two = (load_file(run.path / "model" / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_run_opens_as_it_was_measured_here_and_by_the_lines_of_its_card(quantized, tmp_path, kind):
    run = train(
        quantized(kind=kind, train=LONG | {"num_train_epochs": 3}), tmp_path / "run", quiet=True, say=lambda t: None
    )
    written = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    predictor = open_run(run.path)
    assert layers(predictor.model)
    rows = checking.prepare(run.recipe()).data.test
    same_answers([line["tuned"] for line in written], predictor(rows), abs=1e-6)
    program = f"""
import json, os, torch
os.chdir({str(run.path)!r})
there = {{}}
exec("\\n".join(json.load(open("usage.json"))["load"]), there)
with torch.inference_mode():
    logits = there["model"](**there["processor"]({rows[0]["text"]!r}, return_tensors="pt")).logits
print(json.dumps(torch.softmax(logits[0], -1).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs == pytest.approx(list(written[0]["tuned"]["scores"].values()), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_c37_merging_goes_onto_the_weights_that_the_bits_stand_for(quantized, kind, options):
    ready = checking.prepare(quantized(kind=kind, method={"name": "lora", "r": 4, **options}))
    task, loaded = checking.load(ready)
    model = ready.method.apply(loaded.model, loaded).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    with torch.no_grad():
        own = task.predict(model, batch, loaded)
        merged = ready.method.merge(model).eval()
        same_answers(own, task.predict(merged, batch, loaded), abs=1e-4)
    assert not quantize.is_quantized(merged)
    assert quantize.is_quantized(model), "the model itself is left alone"
    assert type(merged).__module__.startswith("transformers")


def opened(folder, auto="AutoModelForCausalLM", kind="nf4"):
    return open_checkpoint(auto, ModelSpec(str(folder), quantize=kind), None)


def moved(method, loaded):
    """The method on the model, its additions a little away from where they begin."""
    model = find.build("methods", method, {}, Method).apply(loaded.model, loaded).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


WORDS = torch.tensor([[5, 9, 12, 20], [7, 7, 30, 4]])


def logits(model, words=WORDS):
    with torch.no_grad():
        return model.eval()(input_ids=words).logits


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Its matrices are Conv1D, (in, out): as linear layers they would be saved the other way round."""
    import transformers

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.15}
    config = transformers.GPT2Config(**settings, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.causal_lm(tmp_path_factory.mktemp("llama"), **WIDE)


def test_c39_products_of_four_bits_are_computed_in_a_format_that_was_chosen(llama, monkeypatch):
    """Left open it would be that of the first input, or float16."""
    assert {layer.compute_dtype for layer in layers(opened(llama).model).values()} == {torch.float32}
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(quantize, "_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert quantize.settings("nf4", [], "cuda").bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_a_merged_model_is_saved_the_way_round_its_class_reads_it(request, tmp_path, base, method, kind):
    import transformers

    loaded = opened(request.getfixturevalue(base), kind=kind)
    model = moved(method, loaded)
    own = logits(model)
    find.build("methods", method, {}, Method).merge(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), own, atol=1e-4, rtol=0)
    assert not hasattr(again.config, "quantization_config")


def test_merging_into_the_four_bits_would_round_the_change_away(llama):
    """What peft does by itself, for comparison: the reason why folding leaves the few bits."""
    model = moved("lora", opened(llama))
    own, ours = logits(model), logits(find.build("methods", "lora", {}, Method).merge(model))
    with pytest.warns(UserWarning, match="rounding errors"):
        theirs = logits(model.merge_and_unload())
    assert (ours - own).abs().max() < 1e-4
    assert (theirs - own).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_answer_depends_on_its_own_row_and_not_on_when_it_is_asked(llama, kind):
    model = opened(llama, kind=kind).model
    with torch.no_grad():
        model.get_input_embeddings().weight[7] *= 60  # a row of outliers beside the one that is asked
    alone, beside = logits(model, WORDS[:1]), logits(model)[:1]
    torch.testing.assert_close(alone, beside, atol=2e-5, rtol=0)
    torch.testing.assert_close(model.train()(input_ids=WORDS[:1]).logits.detach(), alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(quantize.dequantized(model), WORDS[:1]), alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_reach_the_adapters_after_an_evaluation_and_with_recomputed_activations(llama, kind):
    """bitsandbytes repacks what was evaluated on some CPUs, and has no gradient from then on."""
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        loaded = opened(llama, kind=kind)
        model = moved("lora", loaded)
        logits(model)
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(input_ids=WORDS).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(g is not None and g.abs().max() > 0 for g in found[0].values())
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_step_in_bf16_rounds_nothing_of_the_base_for_good(gpt2, kind):
    """bitsandbytes casts a bias in place to the dtype of what comes in; every product of this model has a bias."""
    model = moved("lora", opened(gpt2, kind=kind))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(input_ids=WORDS).logits.float().square().mean().backward()
    after = dict(model.named_parameters())
    assert all(after[n].dtype == before[n].dtype for n in before)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_gradient_is_that_of_the_weights_which_the_bits_stand_for(llama, kind):
    loaded = opened(llama, kind=kind)
    layer = next(iter(layers(loaded.model).values()))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    way = torch.randn(3, layer.out_features, generator=torch.Generator().manual_seed(1))
    layer(x).backward(way)
    torch.testing.assert_close(x.grad, way @ quantize.matrix(layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "head", "sparse"])
def test_what_would_write_a_whole_model_is_refused_before_anything_is_loaded(quantized, method):
    with pytest.raises(UserError, match="in few bits cannot become"):
        checking.prepare(quantized(method=method))


def test_weights_in_few_bits_are_never_trained():
    from tunewright.models.surgery import train_in_float32

    with pytest.raises(MethodError, match="few bits, which cannot train"):
        train_in_float32(Claims())


class Claims(torch.nn.Module):
    """A model one of whose byte weights claims to train; torch itself forbids it, peft's classes need not."""

    def named_parameters(self, *args, **keys):
        class Byte:
            requires_grad = True

            @staticmethod
            def is_floating_point():
                return False

        return [("layer.weight", Byte())]


def test_a_model_of_convolutions_alone_is_refused(tiny_recipe):
    with pytest.raises(ModelError, match="no layer of this model can be stored as nf4"):
        checking.load(checking.prepare(few(tiny_recipe("image-classification", method="lora"), "nf4")))


def test_without_the_extra_the_error_names_it(tiny_recipe, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    spec = ModelSpec(tiny_recipe().model.checkpoint, quantize="nf4")
    with pytest.raises(ModelError, match=r"tunewright\[quant\]"):
        open_checkpoint("AutoModelForSequenceClassification", spec, None)
