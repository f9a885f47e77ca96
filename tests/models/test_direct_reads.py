"""Experts are read past the page cache, whole, and whatever is wrong with a file is named."""

import errno
import logging
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raymoe.models import (
    CheckpointWriter,
    expert_parameter_names,
    expert_parameters,
    load_without_experts,
    moe_layers,
)
from raymoe.models import byte_ranges as module
from raymoe.models.byte_ranges import RangeReader
from raymoe.models.landing import Landing, TensorReadError
from raymoe.models.open_file import BLOCK, OpenFile, aligned_empty
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch


def written(folder, model, **options):
    """The model in our writer's files, with checksums."""
    with CheckpointWriter(folder, model, **options) as writer:
        layers = moe_layers(model)
        experts = expert_parameter_names(layers)
        writer.add({name: tensor for name, tensor in model.state_dict().items() if name not in experts})
        for layer in layers:
            flat = torch.zeros(layer.num_experts, layer.layout.numel)
            layer.layout.pack(expert_parameters(layer), flat)
            writer.add_experts(layer, dict(enumerate(flat)))
    return folder


def all_experts(files, dtype=torch.float32):
    flat = [torch.zeros(layer.num_experts, layer.layout.numel, dtype=dtype) for layer in files.layers]
    for layer in files.layers:
        for expert in range(layer.num_experts):
            files.read(layer.index, expert, flat[layer.index][expert])
    return flat


@pytest.mark.parametrize("original_names", [True, False], ids=["apart", "fused"])
@pytest.mark.parametrize("family", [*FAMILIES, "switch_transformers"])
def test_every_family_reads_the_same_with_direct_io(family, original_names, tmp_path):
    model = tiny_switch() if family == "switch_transformers" else tiny_model(family)
    written(tmp_path / "m", model, has_original_names=original_names)
    _, buffered = load_without_experts(tmp_path / "m", torch.float32)
    _, direct = load_without_experts(tmp_path / "m", torch.bfloat16, direct_io=True)
    for exact, rounded in zip(all_experts(buffered), all_experts(direct, torch.bfloat16), strict=True):
        assert torch.equal(exact.bfloat16(), rounded)
    assert buffered.reader.mode == "cached"
    assert buffered.reader.counters.device_bytes == 0
    counters = direct.reader.counters
    assert counters.needed_bytes < counters.device_bytes
    assert counters.device_bytes % BLOCK == 0


def test_the_parts_of_an_expert_come_with_one_request(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    _, files = load_without_experts(tmp_path, None, direct_io=True)
    before = files.reader.counters.ranges
    assert files.read(1, 3, torch.empty(files.layers[1].layout.numel)) == 3 * 16 * 32 * 4
    assert files.reader.counters.ranges == before + 1


class Ranges:
    """A file of random bytes, its content, and a reader for it."""

    def __init__(self, folder, size, direct_io=True):
        self.path = folder / f"bytes-{size}"
        self.content = torch.randint(0, 256, (size,), dtype=torch.uint8)
        self.path.write_bytes(self.content.numpy().tobytes())
        self.reader = RangeReader(direct_io=direct_io)

    def landing(self, start, flat, dtype=torch.uint8, crc32=None):
        return Landing(self.path, start, dtype, flat, "t", crc32)


# sizes around blocks, gaps that are bridged and gaps that are not, landings that may be written straight
pieces = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 3, 512, BLOCK, 9 * BLOCK, 70_000]) | st.integers(0, 300),
        st.sampled_from([0, BLOCK, 2 * BLOCK, 8 * BLOCK]) | st.integers(0, 40_000),
        st.booleans(),
    ),
    max_size=6,
)


@pytest.mark.parametrize("mode", ["direct", "dropped", "cached"])
@given(pieces=pieces, tail=st.integers(0, 2 * BLOCK), staging=st.sampled_from([BLOCK, 3 * BLOCK, 16 * 2**20]))
@settings(deadline=None, max_examples=40)
def test_ranges_of_any_size_and_place(tmp_path_factory, mode, pieces, tail, staging):
    starts, position = [], 0
    for gap, size, _ in pieces:
        starts.append(position + gap)
        position += gap + size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STAGING_BYTES", staging)
        ranges = Ranges(tmp_path_factory.mktemp("r"), position + tail, direct_io=mode != "cached")
        if mode == "dropped":
            ranges.reader.mode = "dropped"
        flats = [
            aligned_empty(size, dtype=torch.uint8) if is_aligned else torch.empty(size + 1, dtype=torch.uint8)[1:]
            for _, size, is_aligned in pieces
        ]
        landings = [ranges.landing(start, flat) for start, flat in zip(starts, flats, strict=True)]
        assert ranges.reader.read(landings[::-1]) == sum(flat.numel() for flat in flats)
    assert ranges.reader.mode == mode
    for start, flat in zip(starts, flats, strict=True):
        assert torch.equal(flat, ranges.content[start : start + flat.numel()])


@pytest.mark.parametrize("staging", [BLOCK, 16 * 2**20])
@pytest.mark.parametrize("start", [0, 8, 4090, BLOCK])
def test_elements_are_cast_as_they_arrive(start, staging, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_STAGING_BYTES", staging)
    for direct_io in (True, False):
        ranges = Ranges(tmp_path, 40_000, direct_io)
        wanted = ranges.content[start : start + 20_002].view(torch.int16)
        flat = torch.empty(10_001, dtype=torch.float64)
        ranges.reader.read([ranges.landing(start, flat, torch.int16)])
        assert torch.equal(flat, wanted.double())


def test_whole_blocks_go_straight_to_where_they_are_wanted(tmp_path, monkeypatch):
    ranges = Ranges(tmp_path, 10 * BLOCK)
    flat = aligned_empty(4 * BLOCK, dtype=torch.uint8)
    monkeypatch.setattr(Landing, "put", None)
    ranges.reader.read([ranges.landing(2 * BLOCK, flat)])
    assert torch.equal(flat, ranges.content[2 * BLOCK : 6 * BLOCK])
    assert ranges.reader.counters.device_bytes == 4 * BLOCK


def test_fused_experts_of_our_files_start_at_whole_blocks(tmp_path):
    written(tmp_path / "m", tiny_model("gpt_oss"), has_original_names=False)
    _, files = load_without_experts(tmp_path / "m", None)
    starts = [e.start for e in files._files._files.entries.values() if "experts.gate_up_proj" in e.file.name]
    assert all(start % BLOCK == 0 for start in starts)


def test_where_direct_io_is_refused_the_page_cache_is_emptied(tmp_path, monkeypatch, caplog):
    """By the file system as the file is opened, as some do."""
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="20KB")
    really = os.open

    def refuse(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    dropped = []
    drop = OpenFile.drop
    monkeypatch.setattr(OpenFile, "drop", lambda *args: dropped.append(drop(*args)))
    with caplog.at_level(logging.WARNING, "raymoe"):
        _, files = load_without_experts(tmp_path, None, direct_io=True)
    read = all_experts(files)
    assert files.reader.mode == "dropped"
    assert len(dropped) == files.reader.counters.ranges
    assert caplog.text.count("refuses direct I/O") == 1
    monkeypatch.undo()
    _, plain = load_without_experts(tmp_path, None)
    assert all(map(torch.equal, read, all_experts(plain)))


def test_direct_io_that_is_refused_at_the_first_read(tmp_path, monkeypatch, caplog):
    ranges = Ranges(tmp_path, 3 * BLOCK)
    really, refused = os.preadv, []

    def refuse(number, buffers, start):
        if not refused:
            refused.append(number)
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(number, buffers, start)

    monkeypatch.setattr(os, "preadv", refuse)
    flat = torch.empty(100, dtype=torch.uint8)
    ranges.reader.read([ranges.landing(5, flat)])
    ranges.reader.read([ranges.landing(5, flat)])
    assert torch.equal(flat, ranges.content[5:105])
    assert ranges.reader.mode == "dropped"
    assert caplog.text.count("refuses direct I/O") == 1


def test_requests_that_are_answered_in_part_are_continued(tmp_path, monkeypatch):
    ranges = Ranges(tmp_path, 9 * BLOCK)
    really = os.preadv

    def little(number, buffers, start):
        return really(number, [buffers[0][:BLOCK]], start)

    monkeypatch.setattr(os, "preadv", little)
    flat = torch.empty(6 * BLOCK, dtype=torch.uint8)
    ranges.reader.read([ranges.landing(100, flat)])
    assert torch.equal(flat, ranges.content[100 : 100 + 6 * BLOCK])


def test_what_the_device_cannot_read_is_named(tmp_path, monkeypatch):
    tiny_model("olmoe").save_pretrained(tmp_path)
    _, files = load_without_experts(tmp_path, None, direct_io=True)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        TensorReadError, match=r"expert 3 of model\.layers\.1\.mlp\.experts: .*model\.safetensors: tensor "
        r"'model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight' cannot be read: Input/output error",
    ):  # fmt: skip
        files.read(1, 3, torch.empty(files.layers[1].layout.numel))


@pytest.mark.parametrize("direct_io", [True, False])
def test_a_file_that_changes_under_us_is_named(direct_io, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    _, files = load_without_experts(tmp_path, None, direct_io=direct_io)
    file = tmp_path / "model.safetensors"
    out = torch.empty(files.layers[0].layout.numel)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(TensorReadError, match=r"expert 7 of model\.layers\.1.*has changed since it was opened"):
        files.read(1, 7, out)


@pytest.mark.parametrize("direct_io", [True, False])
def test_a_file_that_ends_too_early_is_named(direct_io, tmp_path, monkeypatch):
    ranges = Ranges(tmp_path, 2 * BLOCK + 5, direct_io)
    with pytest.raises(
        TensorReadError, match=r"tensor 't' cannot be read: the file ends at byte 8197, needed are 9000"
    ):
        ranges.reader.read([ranges.landing(BLOCK, torch.empty(9000 - BLOCK, dtype=torch.uint8))])


@pytest.mark.parametrize("original_names", [True, False], ids=["apart", "fused"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_corrupt_bytes_are_found_and_named(direct_io, original_names, tmp_path):
    folder = written(tmp_path / "m", tiny_model("gpt_oss"), has_original_names=original_names)
    _, files = load_without_experts(folder, None)
    span = files._files.spans("model.layers.1.mlp.experts.down_proj", 4)[0]
    with span.file.open("r+b") as file:
        file.seek(span.start + 17)
        (byte,) = file.read(1)
        file.seek(span.start + 17)
        file.write(bytes([byte ^ 4]))
    _, files = load_without_experts(folder, torch.bfloat16, direct_io=direct_io)
    for expert in (3, 5):
        files.read(1, expert, torch.empty(files.layers[1].layout.numel, dtype=torch.bfloat16))
    with pytest.raises(
        TensorReadError,
        match=r"expert 4 of model\.layers\.1\.mlp\.experts: .*'model\.layers\.1\.mlp\.experts\.down_proj' is corrupt: "
        r"its checksum is [0-9a-f]{8}, written was [0-9a-f]{8}\. Copy the file again",
    ):
        files.read(1, 4, torch.empty(files.layers[1].layout.numel, dtype=torch.bfloat16))


def test_checksums_are_compared_the_first_time(tmp_path, monkeypatch):
    _, files = load_without_experts(written(tmp_path / "m", tiny_model("olmoe")), None)
    sums = []
    really = Landing._sum
    monkeypatch.setattr(Landing, "_sum", lambda self, data: (sums.append(self.crc32), really(self, data)))
    first, again = all_experts(files), all_experts(files)
    assert all(map(torch.equal, first, again))
    assert len([crc for crc in sums if crc is not None]) == 2 * 8 * 3


def test_checksums_that_are_none_are_refused(tmp_path):
    folder = written(tmp_path / "m", tiny_model("olmoe"))
    (folder / "experts.crc32.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match=r"experts\.crc32\.json: not checksums .*version 2.*remove it"):
        load_without_experts(folder, None)


def test_threads_do_not_share_a_buffer(tmp_path):
    ranges = Ranges(tmp_path, 40 * BLOCK)
    wrong = []

    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            start, size = torch.randint(0, 20 * BLOCK, (2,), generator=generator).tolist()
            flat = torch.empty(size, dtype=torch.uint8)
            ranges.reader.read([ranges.landing(start, flat)])
            if not torch.equal(flat, ranges.content[start : start + size]):
                wrong.append((start, size))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert ranges.reader.counters.ranges == 240


def test_no_descriptor_is_left(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="20KB")
    before = len(os.listdir("/proc/self/fd"))
    loaded = load_without_experts(tmp_path, None, direct_io=True)
    assert len(os.listdir("/proc/self/fd")) > before
    del loaded
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_loaded_is_not_a_view_of_the_file(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    model, _ = load_without_experts(tmp_path, None)
    before = model.lm_head.weight.clone()
    expected = load_file(tmp_path / "model.safetensors")["lm_head.weight"].clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
        file.seek(0)
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size // 2))
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(before, expected)
