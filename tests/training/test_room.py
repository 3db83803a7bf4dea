"""Whether a training fits in memory: told before anything is written."""

import re
from pathlib import Path

import pytest

from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.planning.estimates import plan_of
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training import room
from mixture_of_tokens.training.merging import Merged, merge
from mixture_of_tokens.training.room import Room, check_room, estimate, room_of
from processes import mot

GIB = 2**30
NAME = "MoT-Medium/32E/8"


def merged(name: str = NAME, **training: str) -> Merged:
    return merge(name, 0, None, Options(device="cpu", training=training))


@pytest.fixture
def with_memory(monkeypatch):
    def have(gib: float, swap: float = 0.0) -> None:
        monkeypatch.setattr(room, "room_of", lambda **_: Room(gib * GIB, (gib + swap) * GIB, "RAM"))

    return have


def test_plan_and_train_count_the_same_rows():
    planned = plan_of(config_from_name(NAME), 256)
    assert planned.micro_batch == merged().config.micro_batch == 256
    assert planned.memory_bytes["total"] == estimate(merged())
    assert (
        estimate(merged(gradient_accumulation_steps="4"))
        == plan_of(config_from_name(NAME), 256, 64).memory_bytes["total"]
    )


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_too_little_memory_is_told_in_a_line_before_anything_is_written(command, tmp_path, capsys, with_memory):
    with_memory(24)
    names = (NAME, "Transformer-Medium") if command == "compare" else (NAME,)
    with pytest.raises(SystemExit, match="2"):
        mot(command, *names, "--device", "cpu", "--out", tmp_path / "out")
    (said,) = capsys.readouterr().err.splitlines()
    assert "39.5 GiB" in said
    assert "24.0 GiB of RAM" in said
    assert not (tmp_path / "out").exists()
    found = re.search(r"--training\.gradient_accumulation_steps (\d+)", said)
    check_room(merged(gradient_accumulation_steps=found[1]))  # neither refused nor close
    assert capsys.readouterr().err == ""


def test_close_to_it_is_a_warning(capsys, with_memory):
    with_memory(45)
    check_room(merged())
    assert "mot: MoT-Medium/32E/8 takes about 39.5 GiB" in capsys.readouterr().err
    with_memory(25, swap=20)  # which is slow, and works
    check_room(merged())
    assert "25.0 GiB of RAM; --training.gradient_accumulation_steps" in capsys.readouterr().err
    with_memory(50)
    check_room(merged())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "training"),
    [
        (NAME, {"activation_checkpointing": "true"}),
        (NAME, {"bf16": "true"}),
        (NAME, {"torch_compile": "true"}),
        ("ReMoE-Mini/32E", {}),
    ],
)
def test_what_may_take_less_than_the_estimate_is_not_refused(name, training, with_memory):
    plain = plan_of(config_from_name(name), 256).memory_bytes["total"] / GIB
    with_memory(0.72 * plain)
    check_room(merged(name, **training))
    with_memory(0.1 * plain)
    with pytest.raises(ValueError, match="to train on 256 rows at once"):
        check_room(merged(name, **training))


def test_where_no_number_of_micro_batches_fits_other_ways_are_named(with_memory):
    with_memory(2)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps 8, --training.activation_checkpointing true or"):
        check_room(merged())


def test_a_dry_run_prints_the_estimate_and_is_not_refused(capsys, with_memory):
    with_memory(24)
    mot("train", NAME, "--device", "cpu", "--dry-run")
    shown = capsys.readouterr()
    assert "39.5 GiB to train on 256 rows at once, and there are 24.0 GiB" in shown.err
    assert shown.out.startswith("format:")  # a configuration, as ever
    mot("compare", "Transformer-Medium", NAME, "--device", "cpu", "--dry-run")
    assert "about 39.5 GiB" in capsys.readouterr().out.splitlines()[1]


def machine(root: Path, groups: dict[str, str], cgroup: str, swap: int = 0) -> Path:
    for file, text in groups.items():
        (root / "sys/fs/cgroup" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / file).write_text(f"{text}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/meminfo").write_text(f"MemTotal:       99 kB\nSwapTotal:      {swap} kB\n")
    return root


@pytest.mark.parametrize(
    ("groups", "cgroup"),
    [
        ({"memory.max": "max", "a/memory.max": "1000", "a/b/memory.max": "max"}, "0::/a/b\n"),
        ({"memory.max": "1000"}, "0::/of/the/machine/outside\n"),
        ({"memory/memory.limit_in_bytes": "1000"}, "5:cpu,cpuacct:/x\n4:memory:/docker/x\n0::/x\n"),
        (
            {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/a/memory.limit_in_bytes": "1000"},
            "4:memory:/a\n",
        ),
    ],
)
def test_the_limit_of_a_control_group_counts(groups, cgroup, tmp_path):
    found = room_of(on_cpu=True, root=machine(tmp_path, groups, cgroup, swap=3))
    assert found == Room(1000, 1000 + 3 * 1024, "memory, by the limit of its control group")


def test_processes_of_a_machine_share_its_memory(tmp_path, monkeypatch):
    alone = room_of(on_cpu=True, root=machine(tmp_path, {"memory.max": "max"}, "0::/\n"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared = room_of(on_cpu=True, root=tmp_path)
    assert (shared.size, alone.what) == (alone.size / 2, "RAM")


def test_a_gpus_memory_is_its_own(monkeypatch):
    monkeypatch.setattr(room.torch.cuda, "device_count", lambda: 2)
    properties = [type("P", (), {"total_memory": size}) for size in (10, 20)]
    monkeypatch.setattr(room.torch.cuda, "get_device_properties", lambda device: properties[device])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "3")
    assert room_of(on_cpu=False) == Room(20, 20, "GPU memory")
