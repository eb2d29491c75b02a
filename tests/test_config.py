import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcmem_cli.engine import config as cfg
from lcmem_cli.engine.errors import ConfigError, InputError, nearest


@pytest.mark.parametrize("name", sorted(cfg.shipped_configs()))
def test_every_shipped_config_validates_and_says_its_purpose(name):
    path = cfg.shipped_configs()[name]
    values = cfg.read_toml(path)
    assert cfg.validate(values, source=name).kind == values["kind"]
    assert len(cfg.describe_config(path)[1]) > 20


def test_the_named_configs_are_shipped():
    assert set(cfg.shipped_configs()) == {
        "stage1",
        "finetune",
        "mini/codec",
        "mini/stage1",
        "mini/finetune",
        "baselines/siamese",
        "baselines/siamese-ntxent",
        "baselines/siamese-ntxent-unsupervised",
    }


def test_resolved_config_reads_back_the_same():
    config = cfg.load_config("stage1", cfg.Stage1Config)
    text = cfg.to_toml(config)
    assert cfg.validate(cfg.tomllib.loads(text), source="text") == config


@pytest.mark.parametrize("kind", cfg.KINDS.values())
def test_every_key_is_shown(kind):
    config = kind(kind=kind.model_fields["kind"].annotation.__args__[0])
    shown = cfg.to_toml(config)
    assert cfg.validate(cfg.tomllib.loads(shown), source="text") == config
    for name, value in config:
        keys = type(value).model_fields if isinstance(value, cfg.Section) else [name]
        section = shown.partition(f"[{name}]\n")[2].partition("\n[")[0] or shown
        for key in keys:
            assert any(
                line.startswith((f"{key} =", f"# {key} is unset")) for line in section.splitlines()
            ) or (f"[{name}.{key}]" in shown), key


def test_all_problems_are_reported_at_once():
    values = {
        "kind": "stage1",
        "netwrk": 1,
        "network": {"bakbone": 3, "num_features": "many"},
        "loss": {"alpha": 2},
    }
    with pytest.raises(ConfigError) as caught:
        cfg.validate(values, source="my.toml")
    text = str(caught.value)
    assert "my.toml" in text and len(caught.value.problems) == 4
    assert "network.bakbone: unknown key; did you mean 'backbone'?" in text
    assert "netwrk: unknown key; did you mean 'network'?" in text
    assert "network.num_features" in text and "loss.alpha" in text


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kind": "stage1", "augmentation": {"preset": "strong"}}, "no effect"),
        ({"kind": "stage1", "codec": {"name": "none"}}, "imagenet"),
        ({"kind": "stage1", "network": {"align_stem": 5}}, "pretrained"),
        ({"kind": "stage1", "network": {"align_stem": 5, "weights": "timm"}}, "to be a file"),
        (
            {
                "kind": "stage1",
                "codec": {"name": "none"},
                "network": {"align_stem": 5, "weights": "w.pth", "normalisation": "imagenet"},
            },
            "align_stem: has no effect",
        ),
        ({"kind": "codec", "runtime": {"compile": True}}, "no effect on train-codec"),
        ({"kind": "finetune", "retention": {"teacher": "t"}}, "needs retention.weight"),
        ({"kind": "finetune", "schedule": {"keep": "last"}}, "patience"),
        ({"kind": "finetune", "retention": {"instance_weight": 1.0}}, "needs retention.weight"),
        ({"kind": "stage1", "retention": {"panel": {"a": "b"}}}, "needs retention.weight"),
        ({"kind": "finetune", "retention": {"panel": {"a": "b"}}}, "no effect in finetune"),
        ({"kind": "stage1", "retention": {"weight": 1.0}}, "needs network.align_stem"),
        ({"kind": "stage1", "network": {"inner_bands": 3}}, "needs network.inner_stride"),
        ({"kind": "stage1", "schedule": {"batch_size": 10, "accumulate": 3}}, "divide"),
        ({"kind": "codec", "model": {"block_channels": [6, 9], "norm_groups": 4}}, "divide"),
        ({"kind": "codec", "model": {"block_channels": [8, 16], "layers_per_block": 0}}, "equal"),
        ({"kind": "codec", "model": {"start": "pixels"}}, "needs 0"),
        ({"kind": "finetune", "loss": {"alpha": 0.0, "negatives": "all"}}, "no effect"),
        ({"kind": "stagge1"}, "did you mean 'stage1'"),
        ({}, "kind"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        cfg.validate(values, source="x")


def test_what_does_not_fit_is_told_beside_what_is_wrong_by_itself():
    values = {
        "kind": "finetune",
        "schedule": {"batch_size": 0, "accumulate": 3, "keep": "last"},
        "retention": {"instance_weight": 1.0},
        "los": {},
    }
    with pytest.raises(ConfigError) as caught:
        cfg.validate(values, source="x")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "schedule.batch_size", "los", "retention.instance_weight", "schedule.keep",
    ]  # fmt: skip


def test_command_line_wins_over_file_over_default(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('kind = "finetune"\n[loss]\nalpha = 0.5\n[runtime]\nseed = 3\n')
    config = cfg.load_config(str(path), cfg.FinetuneConfig, overrides=["loss.alpha=0.25"])
    assert (config.loss.alpha, config.runtime.seed, config.loss.temperature) == (0.25, 3, 0.07)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="the file says 'finetune'"):
        cfg.load_config("finetune", cfg.Stage1Config)


def test_a_long_list_of_names_is_cut():
    said = nearest("?", [f"name{number:04d}" for number in range(2000)])
    assert len(said) < 500 and "2,000 in all" in said
    assert nearest("?", ["b", "a"]) == "valid: a, b"


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(InputError, match="did you mean 'stage1'"):
        cfg.find_config("stage11")


@pytest.mark.parametrize("text", ["loss.alpha", "=3", ".a=1"])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        cfg.parse_override(text)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_config_or_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "c.toml"
    path.write_bytes(b'kind = "stage1"\n' + data)
    try:
        cfg.validate(cfg.read_toml(path), source="fuzz")
    except ConfigError as error:
        assert error.problems


def test_config_commands(run_cli, tmp_path):
    assert "mini/stage1" in run_cli("config", "ls").stdout
    assert "[network]" in run_cli("config", "show", "stage1").stdout
    copy = tmp_path / "mine.toml"
    run_cli("config", "cp", "mini/finetune", copy)
    assert "valid finetune config" in run_cli("config", "check", copy).stdout
    assert "exists already" in run_cli("config", "cp", "stage1", copy, exit_code=2).stderr
    copy.write_text(copy.read_text() + "\n[los]\nalpha = 1\n")
    assert "did you mean 'loss'" in run_cli("config", "check", copy, exit_code=2).stderr
