"""Ray Data as a source: `pip install "ray[data]"` brings what it needs."""

import pytest

from raymoe.actors import ray_session
from raymoe.actors.ray_data import dataset_rows
from raymoe.config import DataConfig, TokenizerConfig
from raymoe.training.batches import open_batches
from raymoe.training.data.prepare import prepare_data
from raymoe.training.data.source import row_options

pytest.importorskip("pandas", reason="Ray Data needs pandas")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(min_cpus=4, own=True, dashboard=False):
        yield


def test_dataset_is_read_in_its_order_and_trained_on(tmp_path):
    import ray.data

    texts = [f"line {i} of the data set says {i * i}.\n" * 20 for i in range(300)]
    items = [{"text": text, "other": 1} for text in texts]
    dataset = ray.data.from_items(items, override_num_blocks=6).map(lambda row: row)
    config = DataConfig(sequence_length=16, tokenizer_processes=0)
    fields = list(row_options(config).values())
    rows = list(dataset_rows(dataset, fields))
    assert [row.values for row in rows] == [{"text": text} for text in texts]
    assert (rows[7].name, rows[7].where) == ("ray_data:8", "ray_data row 8")

    options = TokenizerConfig(vocab_size=300)
    read = dataset_rows(dataset, fields)
    data = prepare_data(config, options, None, tmp_path, seed=0, global_batch=4, rows=read)
    held_out = {document.text for document in data.held_out_documents}
    assert data.train_bytes == sum(len(text) for text in texts if text not in held_out)
    assert open_batches(tmp_path, sequence_length=16, global_batch=4, seed=0).batch(0).tokens.shape == (4, 17)

    with pytest.raises(ValueError, match=r"ray_data: no column 'body', there are \['other', 'text'\]"):
        dataset_rows(dataset, ["body"])
