"""Cluster files: units, errors that a user can mend, and presets."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymoe.cluster_file import ClusterConfig, cluster_names, load_cluster, write_cluster
from raymoe.config import ConfigError, parse_config

SMALL = {
    "nodes": 2,
    "devices_per_node": 4,
    "flops": "50 TFLOP/s",
    "intra_bandwidth": "130 GB/s",
    "inter_bandwidth": "100 Gb/s",
}


def parsed(**changes) -> ClusterConfig:
    return parse_config(ClusterConfig, SMALL | changes)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("inter_bandwidth", "100 Gb/s", 12_500_000_000),
        ("inter_bandwidth", "100Gbit/s", 12_500_000_000),
        ("inter_bandwidth", "25 Gbps", 3_125_000_000),
        ("inter_bandwidth", "12.5 GB/s", 12_500_000_000),
        ("inter_bandwidth", "1 GiB/s", 2**30),
        ("intra_bandwidth", 130e9, 130_000_000_000),
        ("flops", "1.2 PFLOP/s", 1_200_000_000_000_000),
        ("flops", "50 TFLOPS", 50_000_000_000_000),
        ("flops", 5_000_000, 5_000_000),
        ("flops", "5e13", 50_000_000_000_000),
        ("memory", "80GiB", 80 * 2**30),
        ("memory", "80 GB", 80_000_000_000),
        ("host_memory", "2 TB", 2_000_000_000_000),
        ("latency", "50us", 50_000),
        ("latency", "0.2 ms", 200_000),
        ("latency", "0ns", 0),
        ("overlap", "85%", 85),
    ],
)
def test_units(field, text, value):
    assert getattr(parsed(**{field: text}), field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": 4}, "node: unknown key; did you mean 'nodes'?"),
        (
            {"inter_bandwidth": "100 Gx/s"},
            "inter_bandwidth: '100 Gx/s' will not do; write bytes or bits per second, such as",
        ),
        ({"memory": "50%"}, "memory: '50%' will not do; write bytes with a unit, such as '80 GB' or '80GiB'"),
        ({"memory": "0 GB"}, "memory: '0 GB' will not do"),
        ({"latency": "50"}, "latency: '50' will not do; write a time with its unit, such as '50us' or '0.2 ms'"),
        (
            {"flops": "fast"},
            "flops: 'fast' will not do; write floating-point operations per second, such as '50 TFLOP/s'",
        ),
        ({"flops": True}, "flops: 'True' will not do"),
        ({"overlap": "110%"}, "overlap: Input should be less than or equal to 100"),
        ({"nic": "both"}, "nic: Input should be 'shared' or 'per_device' (got 'both')"),
        ({"devices_per_node": 0}, "devices_per_node: Input should be greater than or equal to 1 (got 0)"),
        ({"inter_bandwidth": None}, "inter_bandwidth: missing; 2 nodes need it, such as '400 Gb/s'"),
        ({"intra_bandwidth": None}, "intra_bandwidth: missing; 4 devices in a node need it, such as '450 GB/s'"),
    ],
)
def test_errors_name_the_key_and_say_what_would_be_right(changes, message):
    with pytest.raises(ConfigError) as error:
        parsed(**changes)
    assert str(error.value).startswith(message)


def test_flops_are_required():
    with pytest.raises(ConfigError, match="flops: missing; this key is required"):
        parse_config(ClusterConfig, {"devices_per_node": 1})


def test_the_spec_says_what_the_file_says():
    spec = parsed(
        memory="32 GB",
        latency="10us",
        inter_latency="30us",
        nic="per_device",
        duplex="half",
        tile_rows=128,
        overlap="90%",
    ).spec
    assert spec.node_of == (0, 0, 0, 0, 1, 1, 1, 1)
    assert (spec.intra_bytes_s, spec.inter_bytes_s, spec.flops_s) == (130 * 10**9, 125 * 10**8, 50 * 10**12)
    assert (spec.latency_ns, spec.inter_latency_ns, spec.memory_bytes) == (10_000, 30_000, 32 * 10**9)
    assert (spec.nic_shared, spec.full_duplex, spec.tile_rows, spec.overlap_percent) == (False, False, 128, 90)


def test_one_device_needs_no_links():
    spec = parse_config(ClusterConfig, {"devices_per_node": 1, "flops": "1 TFLOP/s"}).spec
    assert spec.num_devices == 1


@pytest.mark.parametrize("name", cluster_names())
def test_presets_load(name):
    found = load_cluster(name)
    assert found.name == name
    assert found.spec.num_devices == found.config.nodes * found.config.devices_per_node
    assert found.spec.memory_bytes
    assert found.config.memory_bandwidth
    assert "ssumed" in found.note
    assert str(found.config.devices_per_node) in found.config.describe()


def test_hecate_a_is_the_paper_s():
    spec = load_cluster("hecate-a").spec
    assert (spec.num_nodes, spec.num_devices, spec.inter_bytes_s) == (4, 32, 12_500_000_000)


def test_options_go_before_the_file():
    assert load_cluster("gb200-nvl72", nodes=2, devices_per_node=4).spec.node_of == (0, 0, 0, 0, 1, 1, 1, 1)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"nodes: Input should be greater than or equal to 1 \(got 0\)"):
        load_cluster("h100", nodes=0)


def test_an_unknown_name_lists_the_presets(tmp_path):
    with pytest.raises(
        ConfigError, match=r"hecate: neither a preset nor a file. Did you mean 'hecate-[ab]'\? Presets: .*laer"
    ):
        load_cluster("hecate")
    with pytest.raises(ConfigError, match=r"none.yaml: neither a preset nor a file"):
        load_cluster(tmp_path / "none.yaml")


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL | {"latency": 50}))
    with pytest.raises(ConfigError, match=r"mine\.yaml: latency: '50' will not do"):
        load_cluster(tmp_path / "mine.yaml")


rates = st.integers(1, 10**18)


@given(
    rates,
    rates,
    rates,
    st.none() | rates,
    st.integers(0, 10**9),
    st.none() | st.integers(0, 10**9),
    st.integers(0, 100),
)
def test_a_written_cluster_reads_back_equal(flops, intra, inter, memory, latency, inter_latency, overlap):
    config = parsed(
        flops=flops,
        intra_bandwidth=intra,
        inter_bandwidth=inter,
        memory=memory,
        latency=f"{latency}ns",
        inter_latency=None if inter_latency is None else f"{inter_latency}ns",
        overlap=overlap,
    )
    assert parse_config(ClusterConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(exclude_none=True)))) == config


def test_a_written_cluster_is_for_people(tmp_path):
    path = tmp_path / "new" / "measured.yaml"
    config = parsed(memory="32 GB", latency="10us")
    write_cluster(path, config, "Measured here.\nOn a quiet day.")
    text = path.read_text()
    assert text.startswith("# Measured here.\n# On a quiet day.\nnodes: 2\n")
    assert (
        "flops: 50 TFLOP/s\nmemory: 32 GB\nintra_bandwidth: 130 GB/s\ninter_bandwidth: 12.5 GB/s\nlatency: 10 us\n"
        in text
    )
    assert load_cluster(path).config == config
    assert load_cluster(path).note == "Measured here.\nOn a quiet day."
