"""`mesh: auto`: the rule, from the number of devices and the plan."""

from __future__ import annotations

import dataclasses

import pytest

from jaxtune.config import MeshConfig
from jaxtune.config_io import from_dict
from jaxtune.devices import sheet
from jaxtune.errors import UserError
from jaxtune.health import LLAMA_3_8B, qlora_run
from jaxtune.planning import with_mesh
from jaxtune.traffic import LINKS, scaling

LARGE = LLAMA_3_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LARGE |= {"num_attention_heads": 64}


@pytest.mark.parametrize(
    ("hf_config", "card", "devices", "axes"),
    [
        (LLAMA_3_8B, "h200", 1, MeshConfig()),
        (LLAMA_3_8B, "h200", 8, MeshConfig(data=8)),
        (LLAMA_3_8B, "h200", 6, MeshConfig(data=6)),
        (LARGE, "h200", 8, MeshConfig(data=8)),
        (LARGE, "a100-40", 8, MeshConfig(data=4, fsdp=2)),
        (LARGE, "rtx-4090", 8, MeshConfig(data=2, fsdp=4)),
        # Nothing fits: the most that can be done, which the run's own check then refuses.
        (LARGE, "t4", 2, MeshConfig(fsdp=2)),
    ],
)
def test_data_as_long_as_it_fits(hf_config: dict[str, object], card: str, devices: int, axes: MeshConfig) -> None:
    run = dataclasses.replace(qlora_run(24, 1024, remat="full"), mesh=MeshConfig(auto=True))
    chosen, reason = with_mesh(run, dict(hf_config), sheet(card), devices)
    assert chosen.mesh == axes
    assert reason.startswith("mesh auto: ")
    assert chosen == dataclasses.replace(run, mesh=axes)


def test_what_is_set_stays() -> None:
    run = dataclasses.replace(qlora_run(8, 64), mesh=MeshConfig(fsdp=2))
    assert with_mesh(run, LLAMA_3_8B, sheet("h200"), 8) == (run, "")


def test_rows_must_be_shared_equally() -> None:
    run = dataclasses.replace(qlora_run(4, 64), mesh=MeshConfig(auto=True))
    with pytest.raises(UserError, match=r"train.batch_size is 4, which mesh.data \* mesh.fsdp = 8 does not divide"):
        with_mesh(run, LLAMA_3_8B, sheet("h200"), 8)


def test_scaling_is_the_share_that_is_not_spent_sending() -> None:
    shares = scaling({"fsdp": 340e9, "data": 0.0}, 1.0)
    assert shares["NVLink 4"] == 0.5
    assert scaling({}, 1.0) == dict.fromkeys(LINKS, 1.0)


def test_one_word_in_yaml() -> None:
    sections = {"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output": {"dir": "c"}}
    assert from_dict({**sections, "mesh": "auto"}).mesh == MeshConfig(auto=True)
    with pytest.raises(UserError, match="mesh is 'all'; it must be a section"):
        from_dict({**sections, "mesh": "all"})
    with pytest.raises(UserError, match=r"mesh.auto is true, and axes of the mesh are set"):
        from_dict({**sections, "mesh": {"auto": True, "data": 2}})
