"""Checks the measured record: `python tests/check_docs.py` prints each fault and exits with 1.

The records of experiments/ have their fields and length, RESULTS.md its sections and table sizes,
every link leads to a file, and LOG.md lists each record once. Each decimal of a table stands in a
CSV: for a record in one that it names, for RESULTS.md in any.
"""
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("Study", "Commit", "Seeds", "Machine", "Time", "Data", "Supersedes")
SECTIONS = ("Question", "Registered before the run", "Result", "Reading", "Decision")
OUTCOMES = ("positive", "negative", "null", "choice")
DECIMAL = re.compile(r"(?<![\w.])[+−-]?(\d*\.\d+)(?![\w.])")


def table_cells(text):
    """The cells of every Markdown table row that is not a header or its rule."""
    lines = text.splitlines()
    for above, line in zip([""] + lines, lines):
        is_header = line.startswith("|") and not above.startswith("|")
        if line.startswith("|") and not is_header and not line.startswith("|---"):
            yield [cell.strip() for cell in line[1:-1].split("|")]


def tables(text):
    """(rows, columns) of every Markdown table."""
    sizes, rows, columns = [], 0, 0
    for line in text.splitlines() + [""]:
        if line.startswith("|"):
            rows += 1
            columns = line.count("|") - 1
        elif rows:
            sizes.append((rows - 2, columns))
            rows = 0
    return sizes


def measured(paths):
    """Every number of these CSVs, without its sign, as ".250"."""
    numbers = set()
    for path in paths:
        for row in csv.reader(path.read_text(encoding="utf-8").splitlines()):
            for cell in row:
                numbers.update(found.lstrip("0") for found in DECIMAL.findall(cell))
    return numbers


def links(path, text):
    """A fault for each relative link that leads nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        local = target.split("#")[0]
        if local and "://" not in local and not (path.parent / local).exists():
            yield f"{path.relative_to(ROOT)}: link to {target}, which does not exist"


def unmeasured(path, text, known):
    """A fault for each decimal in a table that no CSV has."""
    for cells in table_cells(text):
        for cell in cells[1:]:
            for number in DECIMAL.findall(cell):
                if number.lstrip("0") not in known:
                    yield f"{path.relative_to(ROOT)}: {number} is in none of its CSVs"


def record_faults(path):
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    if text.count("\n") > 60:
        yield f"{name}: {text.count(chr(10))} lines, 60 are allowed"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", path.name):
        yield f"{name}: the name is not YYYY-MM-DD-name.md"
    for field in FIELDS:
        if not re.search(rf"^- {field}: \S", text, re.MULTILINE):
            yield f"{name}: no field {field}"
    if "uperseded by: " not in text:
        yield f"{name}: does not say what supersedes it"
    if tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) != SECTIONS:
        yield f"{name}: the sections are not {', '.join(SECTIONS)}"
    data = [path.parent / target for target in re.findall(r"\]\(([^)]+\.csv)\)", text)]
    if data:
        yield from unmeasured(path, text, measured(file for file in data if file.exists()))
    yield from links(path, text)


def results_faults(path):
    text = path.read_text(encoding="utf-8")
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        if section.count("\n") > 40:
            yield f"RESULTS.md: {title}: {section.count(chr(10))} lines, 40 are allowed"
        if "Run: " not in section or "experiments/" not in section:
            yield f"RESULTS.md: {title}: no command or no link to a record"
        for rows, columns in tables(section):
            if rows > 8 or columns > 6:
                yield f"RESULTS.md: {title}: a table of {rows} rows and {columns} columns"
    yield from unmeasured(path, text, measured((ROOT / "results").glob("*.csv")))
    yield from links(path, text)


def log_faults(path, records):
    text = path.read_text(encoding="utf-8")
    listed = re.findall(r"\]\(experiments/(\d[^)]+)\)", text)
    if sorted(listed) != sorted(record.name for record in records):
        yield "LOG.md: it does not list each record once"
    for date, title, outcome, link in table_cells(text):
        target = ROOT / re.search(r"\(([^)]+)\)", link)[1]
        if outcome not in OUTCOMES:
            yield f"LOG.md: {title}: outcome {outcome}"
        if not target.name.startswith(date):
            yield f"LOG.md: {title}: {date} is not its record's date"
        if target.exists() and target.read_text(encoding="utf-8").splitlines()[0] != f"# {title}":
            yield f"LOG.md: {title}: its record has another title"
    yield from links(path, text)


def faults():
    """Every fault of the record, one line each."""
    records = sorted((ROOT / "experiments").glob("[0-9]*.md"))
    found = []
    for record in records:
        found += record_faults(record)
    found += results_faults(ROOT / "RESULTS.md")
    found += log_faults(ROOT / "LOG.md", records)
    for path in [ROOT / "experiments" / "README.md", *(ROOT / "docs").glob("*.md")]:
        found += links(path, path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    found = faults()
    print("\n".join(found) or "no fault")
    sys.exit(1 if found else 0)
