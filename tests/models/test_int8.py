"""8-bit encoders: near to what they were made from, and the same result whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_encoder

from clinical_nlp.errors import ModelError
from clinical_nlp.models.int8 import FILE, export_int8, load_int8
from clinical_nlp.models.loading import load_base
from clinical_nlp.models.resolve import resolve_model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = load_base(str(write_encoder(folder / "encoder")))
    base.network.train()
    export_int8(base.network, folder / "int8")
    assert base.network.training, "the export leaves the network as it was"
    base.tokenizer.save_pretrained(folder / "int8")
    return base.network.eval(), load_int8(folder / "int8"), folder / "int8"


def batch(rows):
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    return ids, mask


def test_states_are_near_those_of_the_network(both):
    network, small, _ = both
    ids, mask = batch([[5, 9, 200, 14, 80], list(range(3, 290, 2)), [7, 8]])
    with torch.inference_mode():
        expected = network(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found = small(ids, mask).last_hidden_state[mask.bool()]
    assert found.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99
    assert not torch.equal(found, expected), "nothing was rounded"


def test_a_sequence_comes_out_the_same_in_any_batch(both):
    _, small, _ = both
    rows = [[5, 9, 200, 14, 80], list(range(3, 290, 2)), [7, 8]]
    with torch.inference_mode():
        together = small(*batch(rows)).last_hidden_state
        for number, row in enumerate(rows):
            alone = small(*batch([row])).last_hidden_state[0]
            assert torch.equal(together[number, : len(row)], alone)
            assert not together[number, len(row) :].any()


def test_it_only_predicts(both):
    _, small, folder = both
    with pytest.raises(ModelError, match="only predicts"):
        small(*batch([[5, 6]]))
    with pytest.raises(ModelError, match="only predicts"):
        load_base(str(folder))
    base = load_base(str(folder), quantization="int8")
    assert (base.quantization, base.is_decoder, base.network.config.hidden_size) == ("int8", False, 64)


def test_its_digest_is_of_its_weights_and_a_damaged_file_is_one_line(both, tmp_path):
    _, _, folder = both
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert resolve_model(str(copy)).digest == resolve_model(str(folder)).digest
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:1000])
    assert resolve_model(str(copy)).digest != resolve_model(str(folder)).digest
    with pytest.raises(ModelError, match="cannot be read") as refused:
        load_base(str(copy), quantization="int8")
    assert "\n" not in str(refused.value)
