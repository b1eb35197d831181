"""Without padding between its blocks a model computes what it does with it, gradients too; who cannot is left alone."""

import pytest
import torch
import transformers

from tunewright.models.unpadded import ROUND, Places, attend_by_places, unpadded
from tunewright.runs.training import train

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
FAMILIES = {
    "Bert": (SMALL, True), "Roberta": (SMALL | {"pad_token_id": 0}, True), "Electra": (SMALL, True),
    "DistilBert": (DISTIL, True), "DebertaV2": (SMALL | {"relative_attention": True}, False),
    "GPT2": ({"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, False),
}  # fmt: skip


def model_of(family):
    settings, takes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    return model, list(layers), takes


def batch():
    lengths = torch.tensor([19, 4, 11, 1])
    mask = (torch.arange(19) < lengths[:, None]).long()
    ids = torch.randint(3, 64, (4, 19), generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_those_of_the_padded_model(family, always):
    model, blocks, takes = model_of(family)
    attend_by_places()
    found = []
    for without in (False, True):
        model.zero_grad()
        if without:
            with unpadded(blocks, always) as places:
                loss = model(**batch()).loss
        else:
            loss = model(**batch()).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert [len(place.real) for place in places] == ([35 if always else 2 * ROUND] if takes else [])
    assert len(found[0]) == len(found[1]) > 20
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


def test_outside_the_model_runs_as_ever():
    model, blocks, _ = model_of("Bert")
    attend_by_places()
    shapes = []
    blocks[1].register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        model(**batch())
        with unpadded(blocks):
            model(**batch())
        model(**batch())
    assert shapes == [(4, 19, 16), (1, 2 * ROUND, 16), (4, 19, 16)]


def test_places_come_back_where_they_were():
    mask = (torch.arange(9) < torch.tensor([[9], [2], [5]]))[:, None, None].expand(3, 1, 9, 9)
    place = Places.of(mask, always=True)
    x = torch.arange(3.0 * 9 * 2).view(3, 9, 2)
    there = mask[:, 0, 0]
    assert torch.equal(place.pack(x)[0], x[there])
    assert torch.equal(place.unpack(place.pack(x))[there], x[there])


def test_masks_of_something_else_are_not_taken():
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    assert Places.of(causal, always=True) is None
    full = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    assert Places.of(full) is None, "nothing is padded"
    full = full.clone()
    full[0, :, :, -1] = False
    assert Places.of(full) is None, "one place of eighty is not worth it"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_says_what_it_does(tiny_recipe, tmp_path, method):
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "precision": "float32"}
    run = train(tiny_recipe(method=method, train=settings), tmp_path / "a", quiet=True, say=lambda text: None)
    said = run.read_json("data.json")["settings"]
    assert sum("Padded places are left out" in line for line in said) == 1, said


def test_a_decoder_is_padded_and_says_why(tiny_recipe, tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "precision": "float32", "packing": False}
    run = train(tiny_recipe("sft", method="lora", train=settings), tmp_path / "a", quiet=True, say=lambda text: None)
    said = run.read_json("data.json")["settings"]
    assert any("Padded places run through every block: its blocks are given more" in line for line in said), said
