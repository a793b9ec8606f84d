"""The one call for a day with a GPU, rehearsed on the CPU."""
import json

import gpu
from forked import Forked


def test_the_call_is_rehearsed_on_the_cpu(judged_data, tmp_path):
    """Every part answers within its time, none fails, and what a person takes home is there; the table has its figures."""
    with Forked("--out=out", "--data", judged_data, "--device=cpu", "--seconds=2", "--width=4", cwd=tmp_path,
                code="import gpu; gpu.LEAST_SECONDS = 300; gpu.main()") as process:
        code, _, errors = process.end()
    assert code == 0, errors
    found = gpu.results(tmp_path / "out")
    assert {row["part"] for row in found} == set(gpu.PARTS)
    assert [row for row in found if "failed" in row or row.get("good") is False] == []
    assert {"gpu.json", "log.jsonl", "grid.png", "averaged-float16.pt"} <= {path.name for path in (tmp_path / "out").iterdir()}
    rows = gpu.table(found).splitlines()
    assert len(rows) == 2 + 9 and all("not run" in row for row in rows[3:5])  # one size of minibatch alone is tried here
    assert all(cell.strip().replace(",", "").isdigit() for row in rows[2::3] for cell in row.split("|")[2:4])


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch):
    """Its traceback, or after how long it was killed, stands among the results."""
    def fails(call):
        call.tell(half=1)
        raise ValueError("of this part alone")
    call = gpu.Call(gpu.argparse.Namespace(out=tmp_path, seconds=1, width=4, device="cpu", data=None))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "PARTS", {"fails": (fails, 1), "hangs": (lambda call: gpu.threading.Event().wait(), 0.1),
                                       "works": (lambda call: call.tell(good=True), 1)})
    gpu.run_all(call)
    half, failed, killed, good = gpu.results(tmp_path)
    assert half == {"part": "fails", "half": 1} and good == {"part": "works", "good": True}
    assert "of this part alone" in failed["failed"] and "Traceback" in failed["failed"] and "killed after" in killed["failed"]


def test_the_report_writes_the_table_into_the_results(tmp_path, monkeypatch):
    """Between its two marks, and nothing else of the page."""
    (tmp_path / "tests").mkdir()
    page = tmp_path / "tests" / "RESULTS.md"
    page.write_text("before\n<!-- gpu -->\nnot run\n<!-- /gpu -->\nbehind\n")
    rows = [{"part": "machine", "name": "a GPU", "torch": "2.11"}, {"part": "updates", "good": False},
            {"part": "speed WGAN", "model": "WGAN", "faces": 64, "variant": "plain", "images_per_second": 1234.5}]
    (tmp_path / "gpu.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.report(gpu.results(tmp_path))
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\na GPU, torch 2.11; 1 of 3 checks failed.") and text.endswith("-->\nbehind\n")
    assert "| WGAN, 64 | 1,234 | not run |" in text
