"""Bottleneck adapters: where they stand against a calculation by hand, what moves, what a file opens to without us."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import same_answers, shared
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from tunewright import find
from tunewright.contracts import Loaded, Method
from tunewright.errors import MethodError, RecipeError
from tunewright.methods.bottleneck import LEAST
from tunewright.models.bottleneck_modules import adapters, heads
from tunewright.models.layout import layout_of
from tunewright.models.places import attentions, feed_forwards, units
from tunewright.models.surgery import count_parameters, set_mode
from tunewright.runs import checking

PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
TEXT, IMAGE, WRITING = "text-classification", "image-classification", "causal-lm"


def bottleneck(**options) -> Method:
    return find.build("methods", "bottleneck", options, Method)


def adapted(tiny_recipe, task=TEXT, **options):
    """(prepared, task, loaded, adapted model, untouched copy of the base)."""
    ready = checking.prepare(tiny_recipe(task, method={"name": "bottleneck", **options}))
    task_object, loaded = checking.load(ready)
    base = copy.deepcopy(loaded.model).eval()
    torch.manual_seed(3)
    return ready, task_object, loaded, ready.method.apply(loaded.model, loaded).eval(), base


def moved(model, by=0.2):
    """As after training: every number that trains somewhere else."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(ready, task, loaded, n=3):
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:n]])
    return {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}


def bare(architecture, config, **settings):
    """(model, loaded) of an architecture made here, random."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
    return model, Loaded(model, None, layout_of(model))


# ------------------------------------------------------------------ the start, the formula
@pytest.mark.parametrize("task", [TEXT, IMAGE, WRITING])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_start_equals_the_base_to_the_last_bit(tiny_recipe, task, placement):
    ready, task_object, loaded, model, base = adapted(tiny_recipe, task, placement=placement)
    inputs = inputs_of(ready, task_object, loaded)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        assert not torch.equal(moved(model)(**inputs).logits, base(**inputs).logits)


def by_hand(model, x):
    """U gelu(D x + b) + c, from the tensors alone, for features on the last axis."""
    down, up = model.down, model.up
    return gelu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias


def test_bert_by_hand_in_each_placement(tiny_recipe):
    """One layer calculated from its own weights, adapters put in where the papers draw them."""
    for placement in PLACEMENTS:
        _, _, _, model, _ = adapted(tiny_recipe, placement=placement, bottleneck_size=3)
        layer = moved(model).bert.encoder.layer[0]
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            context = layer.attention.self(x)[0]
            dense = layer.attention.output.dense
            attended = torch.nn.functional.linear(context, dense.weight, dense.bias)
            if placement == "houlsby":
                attended = attended + by_hand(dense.bottleneck, attended)
            attended = layer.attention.output.LayerNorm(attended + x)
            inner = layer.intermediate.intermediate_act_fn(
                torch.nn.functional.linear(attended, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
            )
            dense = layer.output.dense
            out = torch.nn.functional.linear(inner, dense.weight, dense.bias)
            source = attended if placement == "parallel" else out
            out = out + (4.0 if placement == "parallel" else 1.0) * by_hand(dense.bottleneck, source)
            expected = layer.output.LayerNorm(out + attended)
            found = layer(x)
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=placement)
        assert hasattr(layer.attention.output.dense, "bottleneck") == (placement == "houlsby")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_gated_feed_forward_by_hand(tiny_recipe, placement):
    _, _, _, model, _ = adapted(tiny_recipe, WRITING, placement=placement, scale=2.0, bottleneck_size=3)
    mlp = moved(model).model.layers[1].mlp
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inner = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        out = inner @ mlp.down_proj.weight.T
        added = by_hand(mlp.down_proj.bottleneck, x if placement == "parallel" else out)
        torch.testing.assert_close(mlp(x), out + (2.0 if placement == "parallel" else 1.0) * added)


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_a_convolutional_unit_by_hand(tiny_recipe, placement):
    """Behind (or beside) the whole residual layer, as a matrix over channels at each pixel."""
    _, _, _, model, base = adapted(tiny_recipe, IMAGE, placement=placement, bottleneck_size=3)
    moved(model)
    assert [type(m).__name__ for m in model.modules() if hasattr(m, "bottleneck")] == ["ResNetBasicLayer"] * 2
    seen = 0
    for stage, plain in zip(model.resnet.encoder.stages, base.resnet.encoder.stages, strict=True):
        unit = stage.layers[0]
        down, up = unit.bottleneck.down, unit.bottleneck.up
        x = torch.randn(2, (8, 8)[seen], 5, 5, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out = plain.layers[0](x)
            source = x if placement == "parallel" else out
            step = 2 if source.shape[-1] > out.shape[-1] else 1  # 5 pixels to 3, as a stride of two gives
            pixels = source[..., ::step, ::step].movedim(1, -1)
            hidden = gelu(pixels @ down.weight[:, :, 0, 0].T + down.bias)
            added = (hidden @ up.weight[:, :, 0, 0].T + up.bias).movedim(-1, 1)
            expected = out + (4.0 if placement == "parallel" else 1.0) * added
            torch.testing.assert_close(unit(x), expected, atol=1e-5, rtol=1e-5)
        seen += 1
    assert seen == 2


# --------------------------------------------------------------------------- counting
@pytest.mark.parametrize(("placement", "per_block"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_it_trains_two_r_d_and_r_and_d_numbers_an_adapter(tiny_recipe, placement, per_block):
    d, r, blocks = 16, 3, 2
    _, _, _, model, _ = adapted(tiny_recipe, WRITING, placement=placement, bottleneck_size=r)
    assert count_parameters(model)[0] == blocks * per_block * (2 * d * r + r + d)
    _, _, loaded, model, _ = adapted(tiny_recipe, TEXT, placement=placement, bottleneck_size=r)
    head = sum(p.numel() for place in loaded.fresh for p in heads(model)[place].tuned.parameters())
    assert head >= d * 2 + 2
    assert count_parameters(model)[0] == blocks * per_block * (2 * d * r + r + d) + head


def test_beside_a_unit_that_widens_the_input_width_counts():
    model, loaded = bare(
        "ResNetForImageClassification", "ResNetConfig",
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3,
    )  # fmt: skip
    trained, _ = count_parameters(bottleneck(placement="parallel", bottleneck_size=2).apply(model, loaded))
    units_by_hand = [(8, 8), (8, 16), (16, 16)]
    by_hand = sum(2 * i + 2 + 2 * o + o for i, o in units_by_hand)
    assert trained == by_hand + (16 * 3 + 3)


def test_the_size_is_the_width_over_the_factor_and_never_below_the_least():
    for options, width, size in [({}, 384, 24), ({"reduction_factor": 8}, 384, 48), ({}, 64, LEAST)]:
        model, loaded = bare("ViTModel", "ViTConfig", **VIT | {"hidden_size": width})
        bottleneck(**options).apply(model, loaded)
        assert [added.size for added in adapters(model).values()] == [
            size
        ] * 4  # two blocks, behind attention and feed-forward


# -------------------------------------------------------------------- what moves
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("task", [TEXT, IMAGE, WRITING])
def test_adapters_and_head_move_in_steps_and_nothing_else(tiny_recipe, task, placement):
    ready, task_object, loaded, model, _ = adapted(tiny_recipe, task, placement=placement)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = task_object.collate([task_object.encode(r, loaded) for r in ready.data.train[:8]])
    optimizer = torch.optim.SGD(ready.method.groups(model, loaded, 0.1, 0.0))
    set_mode(model)
    for _ in range(3):
        sum(task_object.loss(model, batch, loaded).totals.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    ours = {n for n in before if ".bottleneck." in n or ".tuned." in n}
    assert changed == ours
    assert len(ours) >= 2 * 4
    assert any(".tuned." in n for n in ours) == (task != WRITING)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in ours)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_reference_is_the_base_head_included_and_what_was_trained_comes_back(tiny_recipe, placement):
    ready, task, loaded, model, base = adapted(tiny_recipe, placement=placement)
    inputs = inputs_of(ready, task, loaded)
    with torch.no_grad():
        tuned = moved(model)(**inputs).logits
        with ready.method.reference(model, None) as off:
            assert torch.equal(off(**inputs).logits, base(**inputs).logits)
        assert torch.equal(model(**inputs).logits, tuned)
    assert not torch.equal(tuned, base(**inputs).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_a_copy_answers_the_same_and_goes_its_own_way(tiny_recipe, task, placement):
    ready, task_object, loaded, model, _ = adapted(tiny_recipe, task, placement=placement)
    inputs = inputs_of(ready, task_object, loaded)
    with torch.no_grad():
        own = moved(model)(**inputs).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(**inputs).logits, own)
        moved(other)
        assert not torch.equal(other(**inputs).logits, own)
        assert torch.equal(model(**inputs).logits, own)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_recipe, placement):
    found = []
    for checkpointing in (False, True):
        ready, task, loaded, model, _ = adapted(tiny_recipe, WRITING, placement=placement)
        moved(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
        sum(task.loss(model, batch, loaded).totals.values()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_writing_with_a_cache_is_writing_without(tiny_recipe, placement):
    ready, task, loaded, model, base = adapted(tiny_recipe, WRITING, placement=placement)
    moved(model, 0.5)
    inputs = {k: v[:1, :6] for k, v in inputs_of(ready, task, loaded).items()}
    wanted = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(**inputs, **wanted, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **wanted, use_cache=False))
    assert not torch.equal(cached, base.generate(**inputs, **wanted))
    assert all(added.seen is None for added in adapters(model).values())


# ----------------------------------------------------------------------- structure
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
VIT = SMALL | {"image_size": 8, "patch_size": 4}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24, "vocab_size": 20}
EXPERTS = SMALL | {"num_key_value_heads": 2}
SHARED = EXPERTS | {"num_experts": 3, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8}
# model: (config, settings, end and begin of the feed-forward, end of the attention)
FAMILIES = {
    "GPT2Model": ("GPT2Config", GPT2, "mlp.c_proj", "mlp.c_fc", "attn.c_proj"),
    "DistilBertModel": ("DistilBertConfig", DISTIL, "ffn.lin2", "ffn.lin1", "attention.out_lin"),
    "ViTModel": ("ViTConfig", VIT, "mlp.fc2", "mlp.fc1", "attention.o_proj"),
    "ModernBertModel": ("ModernBertConfig", SMALL | {"pad_token_id": 0}, "mlp.Wo", "mlp.Wi", "attn.Wo"),
    "OPTModel": ("OPTConfig", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}, "fc2", "fc1", "self_attn.out_proj"),
    "GPTNeoXModel": ("GPTNeoXConfig", SMALL, "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "attention.dense"),
    "MixtralModel": ("MixtralConfig", EXPERTS | {"num_local_experts": 3}, "mlp", "mlp", "self_attn.o_proj"),
    "Qwen2MoeModel": ("Qwen2MoeConfig", SHARED, "mlp", "mlp", "self_attn.o_proj"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_sub_layers_are_found_by_structure(name):
    config, settings, end, begin, attention_end = FAMILIES[name]
    model, loaded = bare(name, config, **settings)
    blocks = loaded.layout.blocks
    assert [(p.writes, p.reads, p.width) for p in feed_forwards(model, loaded.layout)] == [
        (f"{block}.{end}", f"{block}.{begin}", 16) for block in blocks
    ]
    assert [p.writes for p in attentions(model, loaded.layout)] == [f"{block}.{attention_end}" for block in blocks]
    assert len(blocks) == 2


def test_cross_attention_is_a_sub_layer_of_its_own():
    model, loaded = bare("T5Model", "T5Config", d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=20)
    ends = [place.writes for place in attentions(model, loaded.layout)]
    assert len(ends) == 2 + 2 * 2
    assert ends[2:4] == ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.1.EncDecAttention.o"]


def test_stages_are_taken_apart_into_their_layers():
    windows = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 2], "window_size": 2}
    model, loaded = bare("SwinModel", "SwinConfig", depths=[1, 2], **windows)
    ends = [(place.writes, place.width) for place in feed_forwards(model, loaded.layout)]
    assert ends == [
        ("encoder.layers.0.blocks.0.mlp.fc2", 8),
        ("encoder.layers.1.blocks.0.mlp.fc2", 16),
        ("encoder.layers.1.blocks.1.mlp.fc2", 16),
    ]
    model, loaded = bare("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[2, 1], num_stages=2)
    assert units(model, loaded.layout) == tuple(
        f"encoder.stages.{n}" for n in ("0.layers.0", "0.layers.1", "1.layers.0")
    )
    assert [p.convolution for p in feed_forwards(model, loaded.layout)] == [False] * 3


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_starts_at_its_base_and_every_adapter_takes_part(name, placement):
    config, settings, *_ = FAMILIES[name]
    model, loaded = bare(name, config, **settings)
    pixels = "image_size" in settings
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8)} if pixels else {"input_ids": torch.arange(2, 8)[None]}
    with torch.no_grad():
        before = model(**inputs)[0]
    bottleneck(placement=placement).apply(model, loaded)
    out = model(**inputs)[0]
    assert torch.equal(out, before)
    moved(model)
    model(**inputs)[0].square().sum().backward()
    assert len(adapters(model)) == (4 if placement == "houlsby" else 2)
    assert all(p.grad.abs().max() > 0 for added in adapters(model).values() for p in added.parameters())


def test_a_model_with_nothing_that_repeats_is_refused_with_a_way_out():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(MethodError, match=r"no sub-layer.*\n?.*method=lora"):
        bottleneck().apply(model, Loaded(model, None, layout_of(model)))


def test_merging_is_refused_with_a_way_out(tiny_recipe):
    ready, _, _, model, _ = adapted(tiny_recipe)
    with pytest.raises(MethodError, match=r"folded.*\n?.*method=lora"):
        ready.method.merge(model)


@pytest.mark.parametrize(
    "options", [{"placement": "before"}, {"reduction_factor": 0}, {"bottleneck_size": 0}, {"scale": 0.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        bottleneck(**options)


# ---------------------------------------------------------------------- the file
ALONE = """
import json, os, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tunewright":
            raise ImportError("tunewright is not here")
sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
found = {}
for name, (folder, checkpoint, auto, lines) in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    config = transformers.AutoConfig.from_pretrained("model")
    opened = getattr(transformers, auto).from_pretrained(checkpoint, config=config, ignore_mismatched_sizes=True)
    there = {"base": opened}
    exec("\\n".join(lines), there)
    with torch.inference_mode():
        found[name] = there["model"](**load_file("inputs.safetensors")).logits.clone()
assert "tunewright" not in sys.modules
save_file(found, sys.argv[1])
"""


def test_the_cards_lines_open_every_placement_where_tunewright_cannot_be_imported(tiny_recipe, tmp_path):
    ours, wanted = {}, {}
    for task in (TEXT, IMAGE, WRITING):
        for placement in PLACEMENTS:
            ready, task_object, loaded, model, base = adapted(
                tiny_recipe, task, placement=placement, scale=2.5, bottleneck_size=3
            )
            name, folder = f"{task}-{placement}", tmp_path / f"{task}-{placement}"
            (folder / "model").mkdir(parents=True)
            ready.method.save(moved(model), loaded, folder / "model")
            inputs = inputs_of(ready, task_object, loaded)
            save_file(inputs, folder / "inputs.safetensors")
            with torch.inference_mode():
                ours[name] = model(**inputs).logits.clone()
                assert (base(**inputs).logits - ours[name]).abs().max() > 1e-2
            lines = ready.method.opening(loaded)
            assert len(lines) <= 24
            wanted[name] = (str(folder), ready.recipe.model.checkpoint, task_object.auto_class, lines)
    words = [sys.executable, "-c", ALONE, str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(words, input=json.dumps(wanted), capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert theirs.keys() == ours.keys()
    assert len(ours) == 9
    for name, logits in ours.items():
        torch.testing.assert_close(theirs[name], logits, atol=1e-6, rtol=1e-5, msg=name)


def test_the_file_says_more_than_the_options(tiny_recipe, tmp_path):
    ready, task, loaded, model, base = adapted(tiny_recipe, placement="parallel", bottleneck_size=5, scale=3.0)
    moved(model)
    ready.method.save(model, loaded, tmp_path)
    said = json.loads((tmp_path / "bottleneck_config.json").read_text())
    assert (said["placement"], said["scale"]) == ("parallel", 3.0)
    assert [(a["width"], a["size"]) for a in said["adapters"]] == [(16, 5)] * 2
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"adapter.safetensors"}
    inputs = inputs_of(ready, task, loaded)
    with torch.no_grad():
        opened = bottleneck().open(dataclasses.replace(loaded, model=base), tmp_path)
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_a_real_mobilenet_keeps_its_outputs_and_its_statistics(placement):
    import transformers

    folder = shared("models/mobilenet_v2_1.0_224")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixel_values=x).logits
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    method = bottleneck(placement=placement)
    model = method.apply(model, Loaded(model, None, layout_of(model)))
    assert len(adapters(model)) == 16
    set_mode(model, dropout=False)
    assert torch.equal(model(pixel_values=x).logits, before)
    moved(model, 0.01)
    model(pixel_values=x).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for added in adapters(model).values() for p in added.parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_answers_of_a_batch_do_not_depend_on_its_company(tiny_recipe):
    ready, task, loaded, model, _ = adapted(tiny_recipe, placement="parallel")
    moved(model)
    rows = [task.encode(r, loaded) for r in ready.data.train[:4]]
    with torch.no_grad():
        together = task.predict(model, task.collate(rows), loaded)
        alone = [task.predict(model, task.collate([row]), loaded)[0] for row in rows]
    same_answers(together, alone, abs=1e-5)
