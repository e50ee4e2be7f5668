"""Text encoders: relevance per token, with padding masked out."""

import pytest
import torch
import transformers

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.networks import CLASSES, seeded
from tests.helpers.reference import materialised, relative_error

TOKENS = 9
LENGTHS = (9, 6, 4)
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "hidden_size": 48}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=50, num_labels=CLASSES, max_position_embeddings=16, **SIZES)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=50,
            num_labels=CLASSES,
            max_position_embeddings=16,
            dim=48,
            n_layers=3,
            n_heads=3,
            hidden_dim=96,
        )
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=50, num_labels=CLASSES, max_position_embeddings=16, **SIZES)
    ),
    "albert (one shared layer)": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(
            vocab_size=50, embedding_size=16, num_labels=CLASSES, max_position_embeddings=16, **SIZES
        )
    ),
}


def sentences():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (len(LENGTHS), TOKENS), generator=generator)
    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def by_definition(model, inputs, targets):
    """The classifier reads token 0; gradients at padded keys do not count as importance."""
    maps = []
    with materialised(maps):
        logits = model(**inputs).logits
        score = logits[torch.arange(len(logits)), targets].sum()
        grads = torch.autograd.grad(score, maps)
    real = inputs["attention_mask"][:, None, None, :]
    importance = [(grad * real).abs().sum((-2, -1)) for grad in grads]
    row = start = torch.eye(TOKENS)[:1].expand(len(logits), -1)
    for scores, attention in zip(importance, maps, strict=True):
        weights = scores / scores.sum(-1, keepdim=True)
        mixed = (weights[:, :, None, None] * attention.detach()).sum(1)
        row = (row[:, None] @ mixed)[:, 0] + start
    return row * inputs["attention_mask"], importance


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_sequence_classifiers(kind, implementation):
    model, inputs, targets = seeded(MODELS[kind]), sentences(), torch.tensor([0, 3, 2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    row, importance = by_definition(model, inputs, targets)
    model.set_attn_implementation(implementation)
    found = gmar(model, inputs, targets, rollout="paper", signals=True)
    assert found.heatmaps.shape == (3, TOKENS)
    assert relative_error(found.heatmaps, row) < 1e-5
    assert relative_error(found.importance, torch.stack(importance, 1)) < 1e-5
    assert (found.heatmaps[inputs["attention_mask"] == 0] == 0).all()
    assert ((found.signals["entropy"] > 0) & (found.signals["entropy"] <= 1)).all()
    assert found.signals["distance"].isnan().all()
    assert len(found.layers) == 3


def test_padding_changes_nothing():
    model, inputs = seeded(MODELS["bert"]), sentences()
    together = gmar(model, inputs)
    for index, length in enumerate(LENGTHS):
        alone = {key: value[index : index + 1, :length] for key, value in inputs.items()}
        found = gmar(model, alone)
        assert relative_error(together.heatmaps[index, :length], found.heatmaps[0]) < 1e-4
        assert relative_error(together.importance[index], found.importance[0]) < 1e-4


def test_micro_batches_without_a_mask():
    model, inputs = seeded(MODELS["distilbert"]), {"input_ids": sentences()["input_ids"]}
    torch.testing.assert_close(gmar(model, inputs, micro_batch_size=2).heatmaps, gmar(model, inputs).heatmaps)


def test_frozen_embeddings():
    model, inputs = seeded(MODELS["bert"]), sentences()
    expected = gmar(model, inputs)
    model.requires_grad_(False)
    found = gmar(model, inputs)
    torch.testing.assert_close(found.heatmaps, expected.heatmaps)
    torch.testing.assert_close(found.importance, expected.importance)


def test_mask_of_another_shape_is_refused():
    model, inputs = seeded(MODELS["bert"]), sentences()
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :].bool()
    with pytest.raises(UnsupportedModelError, match=r"attention_mask has shape \(3, 1, 1, 9\)"):
        gmar(model, inputs)
