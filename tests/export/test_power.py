"""Energy from what boards really print, through a program and a library that answer as theirs do."""

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from export.device import bench, power
from export.device.power import NotMeasured, NvmlMeter, TegrastatsMeter, find_meter, module_watts
from mnif.cli import main

# Lines of tegrastats as people have published them, JetPack 4 to 7.
LINES = {
    "AGX Orin, JetPack 5": (
        "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729] "
        "EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C Tboard@32C tj@42.593C "
        "VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO "
        "301mW/301mW NC 0mW/0mW",
        2.399 + 0.400 + 4.032,
    ),
    "AGX Orin, JetPack 6": (
        "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112] "
        "EMC_FREQ 3%@2133 GR3D_FREQ 0%@[0,0] NVENC 79%@166 NVDEC off VIC 36%@115 OFA off NVDLA0 off PVA0_FREQ off APE "
        "174 cpu@52.562C tj@52.562C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW",
        2.412 + 1.607 + 4.707,
    ),
    "Orin Nano, JetPack 6": (
        "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU [15%@729,11%@729] EMC_FREQ "
        "43%@2133 GR3D_FREQ 63%@[621] NVDEC off APE 200 cpu@53.968C gpu@53.343C tj@53.968C VDD_IN 12479mW/12479mW "
        "VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW",
        12.479,
    ),
    "Xavier NX, JetPack 4": (
        "RAM 4412/7772MB (lfb 237x4MB) SWAP 139/3886MB (cached 2MB) CPU [9%@1190,6%@1190] EMC_FREQ 10%@1600 GR3D_FREQ "
        "62%@306 APE 150 MTS fg 0% bg 0% AO@41.5C GPU@43C PMIC@100C thermal@42.55C VDD_IN 4067/4067 VDD_CPU_GPU_CV "
        "738/738 VDD_SOC 1353/1353",
        4.067,
    ),
    "AGX Xavier, JetPack 4": (
        "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) CPU [2%@1190,0%@1190,off,off] EMC_FREQ 0%@665 "
        "GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% AO@37.5C GPU@37.5C CPU@37.5C Tboard@37C GPU 0/0 CPU 311/311 SOC "
        "932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482",
        0.311 + 0.932 + 0.621 + 1.482,
    ),
    # Made of the names that JetPack 7 is said to have; the line itself was not seen.
    "Thor, JetPack 7": (
        "11-03-2025 10:00:00 RAM 5200/125771MB (lfb 10x4MB) CPU [1%@972] GR3D_FREQ 0% cpu@40.1C tj@41C VDD_GPU "
        "-392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3924mW VIN_SYS_5V0 5027mW/5027mW VIN 23012mW/23012mW",
        23.012,
    ),
}


@pytest.mark.parametrize("board", LINES)
def test_power_of_a_module(board: str) -> None:
    line, expected = LINES[board]
    assert module_watts(line) == pytest.approx(expected)


@pytest.mark.parametrize(
    "line", ["", "RAM 4412/7772MB CPU [9%@1190]", "VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW", "GPU 3/3"]
)
def test_a_line_that_lacks_an_input_tells_nothing(line: str) -> None:
    assert module_watts(line) is None


@pytest.fixture
def tegrastats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that prints an Orin Nano's line every 20 ms, until it is stopped."""
    program = tmp_path / "bin/tegrastats"
    program.parent.mkdir()
    line = LINES["Orin Nano, JetPack 6"][0]
    program.write_text(f"#!/bin/sh\n[ $1 = --interval ] || exit 1\nwhile :; do echo '{line}'; sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def test_energy_is_power_times_the_time_it_took(tegrastats: Path) -> None:
    meter = find_meter()
    assert isinstance(meter, TegrastatsMeter)
    energy = meter.joules_of(lambda: time.sleep(0.01), 0.3)
    assert 0.3 <= energy.seconds < 3
    assert 1 < energy.calls <= 31
    assert energy.joules == pytest.approx(12.479 * energy.seconds)


def test_bench_has_the_energy_of_each_instance(
    tegrastats: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--graphs", "decoder", "--backends", "onnxruntime", "--rounds", "2", "--energy_seconds", "1"]
    flags += ["--batch_sizes", "1", "--output", str(tmp_path / "bench.json")]
    assert main(["bench", "--bundle", str(exported), *flags]) == 0
    shown = capsys.readouterr().out
    assert "energy: of the whole module, by tegrastats; 12.5 W of it when idle" in shown
    assert "mJ each" in shown
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["millijoules"] > 0


def test_energy_of_an_instance_is_that_of_its_share_of_a_call(tegrastats: Path) -> None:
    def run(arrays: object) -> None:
        time.sleep(0.2)  # long beside what other programs take away

    subjects = [bench.Subject("decoder", "onnxruntime", False, size, run, {}) for size in (1, 8)]
    rows: list[dict[str, Any]] = [{}, {}]
    bench._measure_energy(subjects, rows, 1)
    assert rows[0]["millijoules"] == pytest.approx(12479 * 0.2, rel=0.5)
    assert rows[1]["millijoules"] == pytest.approx(12479 * 0.2 / 8, rel=0.5)


def test_a_board_that_tells_no_power_is_not_measured(tegrastats: Path) -> None:
    tegrastats.write_text("#!/bin/sh\nwhile :; do echo 'RAM 1/2MB CPU [off]'; sleep 0.02; done\n")
    with pytest.raises(NotMeasured, match="tegrastats tells no power here"):
        TegrastatsMeter()


class Nvml:
    """NVML's functions as its header has them: a status each, values through pointers."""

    def __init__(self, energy_status: int = 0):
        self.millijoules, self._energy_status = 5_000_000, energy_status

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 0x10 + index.value
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, energy: Any) -> int:  # noqa: N802
        assert device.value == 0x10
        energy._obj.value = self.millijoules
        return self._energy_status


def test_nvml_counts_what_the_gpu_took() -> None:
    library = Nvml()

    def work() -> None:
        library.millijoules += 250

    energy = NvmlMeter(library).joules_of(work, 0.01)
    assert energy.joules == pytest.approx(0.25 * energy.calls)
    with pytest.raises(NotMeasured, match=r"NVML tells no energy here \(nvmlDeviceGetTotalEnergyConsumption: 3\)"):
        NvmlMeter(Nvml(energy_status=3))


def test_the_energy_of_a_gpu_is_given_to_its_own_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()

    def run(arrays: object) -> None:
        library.millijoules += 40
        time.sleep(0.01)

    monkeypatch.setattr(bench, "find_meter", lambda: NvmlMeter(library))
    on_gpu, on_cpu = (bench.Subject("decoder", name, False, 4, run, {}) for name in ("tensorrt", "onnxruntime"))
    rows: list[dict[str, Any]] = [{"millijoules": None}, {"millijoules": None}]
    assert bench._measure_energy([on_gpu, on_cpu], rows, 1) == "of the GPU alone, by NVML; 0.0 W of it when idle"
    assert [row["millijoules"] for row in rows] == [10, None]
    assert bench._measure_energy([on_cpu], rows[1:], 1).startswith("not measured, NVML tells the GPU's alone")


def test_bench_says_that_nothing_was_measured(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(power.shutil, "which", lambda name: None)
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    flags = ["--graphs", "decoder", "--backends", "onnxruntime", "--rounds", "1", "--batch_sizes", "1"]
    assert bench.main(["--bundle", str(exported), *flags]) == 0
    shown = capsys.readouterr().out
    assert "energy: not measured, there is no tegrastats; there is no NVML" in shown
    assert bench.main(["--bundle", str(exported), *flags, "--energy_seconds", "0"]) == 0
    assert "energy: not measured, --energy_seconds 0" in capsys.readouterr().out
