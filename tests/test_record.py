"""Tests of record.py."""

import shutil

import check_docs


def copy_of_record(tmp_path):
    """A copy of the documents that the check reads."""
    for name in ("experiments", "results", "docs"):
        shutil.copytree(check_docs.ROOT / name, tmp_path / name)
    for name in ("LOG.md", "RESULTS.md"):
        shutil.copy(check_docs.ROOT / name, tmp_path / name)
    return tmp_path


def test_record_is_complete():
    assert check_docs.faults() == []


def test_changed_number_and_missing_field_are_found(tmp_path, monkeypatch):
    root = copy_of_record(tmp_path)
    monkeypatch.setattr(check_docs, "ROOT", root)
    record = root / "experiments" / "2026-11-28-fresh.md"
    text = record.read_text(encoding="utf-8")
    text = text.replace("| .552 ±.006 |", "| .553 ±.006 |").replace("- Seeds:", "- Seed:")
    record.write_text(text, encoding="utf-8")
    found = check_docs.faults()
    assert "experiments/2026-11-28-fresh.md: .553 is in none of its CSVs" in found
    assert "experiments/2026-11-28-fresh.md: no field Seeds" in found


def test_broken_link_is_found(tmp_path, monkeypatch):
    root = copy_of_record(tmp_path)
    monkeypatch.setattr(check_docs, "ROOT", root)
    (root / "experiments" / "2026-11-28-paths.md").unlink()
    found = check_docs.faults()
    assert any("2026-11-28-paths.md, which does not exist" in fault for fault in found)
    assert "LOG.md: it does not list each record once" in found
