import pytest

from raymoe.config import ConfigError, ServeConfig, TrainConfig, load_config, parse_config, parse_memory

OLMOE = {"model": {"config": {"model_type": "olmoe"}}}


def test_the_example_is_valid_and_overrides_lie_over_it():
    config = load_config(TrainConfig, "examples/train.yaml", ["optimizer.lr=3e-4", "workers=3", "experts.policy=ep"])
    assert (config.optimizer.lr, config.workers.min, config.workers.max, config.experts.policy) == (3e-4, 3, 3, "ep")
    assert config.model.config["num_experts"] == 24


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"exprets": {}}, r"^exprets: unknown key; did you mean 'experts'\?$"),
        ({"experts": {"polcy": "ep"}}, r"^experts\.polcy: unknown key; did you mean 'policy'\?$"),
        ({"experts": {"zzz": 1}}, r"^experts\.zzz: unknown key; known keys: policy, "),
        ({"workers": "many"}, r"^workers: give a number of workers from 1 on, or bounds: .*got 'many'"),
        ({"workers": 0}, r"^workers: give a number of workers from 1 on.*\(got 0\)$"),
        ({"workers": {"min": 3}}, r"^workers: min: 3 is above max, 2"),
        ({"snapshots": {"every": -1}}, r"^snapshots: every: must be 'auto' or an integer of at least 0"),
        ({"batch": 1}, r"^batch: 1 sequences do not reach 2 workers; need at least 2$"),
        ({"experts": {"overlap_degree": -1}}, r"^experts\.overlap_degree.*at least 0"),
        ({"model": {"path": "nowhere"}}, r"^model: path: no config.json in nowhere"),
        ({"model": {}}, r"^model: give exactly one of 'path'"),
        ({"model": {"config": {}}}, r"^model: config needs 'model_type'"),
        ({"model": None}, r"^model: "),
        ({"data": {"held_out": 0.7}}, r"^data\.held_out: Input should be less than 0\.5 \(got 0\.7\)$"),
    ],
)
def test_each_mistake_is_one_line_that_names_its_key(tree, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(TrainConfig, OLMOE | tree)
    assert "\n" not in str(caught.value)


def test_every_mistake_gets_its_own_line():
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, OLMOE | {"workers": 0, "stepz": 3})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("workers:")
    assert lines[1].startswith("stepz: unknown key; did you mean 'steps'?")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workers"], "an override is written key=value"),
        (["workers.x=1"], "'workers' holds a single value"),
        (["steps=[1"], "steps: .* is not a YAML value"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainConfig, OLMOE | {"workers": 2}, overrides)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not readable as YAML"):
        load_config(TrainConfig, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        load_config(TrainConfig, tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50%", 500), ("100%", 1000), ("12.5%", 125), ("2KiB", 2048), ("1.5KB", 1500), ("1 MiB", 2**20), (77, 77)],
)
def test_memory_budgets(text, expected):
    assert parse_memory(text, total_bytes=1000) == expected


@pytest.mark.parametrize("text", ["", "0%", "101%", "-5", "5 apples", "nan%", "0"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="not a memory budget"):
        parse_memory(text, total_bytes=1000)


def test_serving_needs_a_model_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"model: no config\.json in .*; give a Hugging Face model directory"):
        parse_config(ServeConfig, {"model": str(tmp_path)})


def test_expert_hosts_are_a_number_or_more(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def parse(*overrides):
        return parse_config(ServeConfig, {"model": str(tmp_path)}, list(overrides))

    assert parse().expert_hosts is None
    assert parse("expert_hosts=3").expert_hosts.memory_each == "33.34%"
    assert ServeConfig(model=tmp_path, expert_hosts="3") == parse("expert_hosts=3")
    more = parse("expert_hosts.count=2", "expert_hosts.memory=8GiB", "on_miss=send")
    assert (more.expert_hosts.count, more.expert_hosts.memory_each, more.on_miss) == (2, "8GiB", "send")
    for text, error in [
        ("expert_hosts=0", r"expert_hosts: give a number of hosts from 1 on, or {count: 3, memory: 40%} \(got 0\)"),
        ("expert_hosts=true", "expert_hosts: give a number of hosts"),
        ("expert_hosts.memory=1GiB", "expert_hosts.count: missing"),
        ("on_miss=send", "on_miss: 'send' needs hosts that hold experts; set expert_hosts"),
    ]:
        with pytest.raises(ConfigError, match=error):
            parse(text)
    with pytest.raises(ConfigError, match=r"expert_hosts.memory: '0%' is not a memory budget"):
        parse("expert_hosts.count=1", "expert_hosts.memory=0%")


def test_every_field_is_documented():
    def fields(cls):
        for name, field in cls.model_fields.items():
            yield f"{cls.__name__}.{name}", field
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    # plain terms of AdamW, and sections whose classes document them
    self_explaining = {"lr", "betas", "eps", "weight_decay", "warmup_steps", "seed", "steps", "dtype"}
    self_explaining |= {"model", "data", "tokenizer", "experts", "optimizer"}
    for name, field in [*fields(TrainConfig), *fields(ServeConfig)]:
        assert field.description or name.split(".")[1] in self_explaining, name
