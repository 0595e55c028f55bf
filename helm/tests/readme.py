"""Writes the table of values into the chart's README.md, from the comments of values.yaml."""

import json

import chart

README = chart.CHART / "README.md"
BEGIN, END = "<!-- values: begin (scripts/chart-test --update-readme) -->\n", "<!-- values: end -->"


def table():
    variables = {".".join(chart.value_path(name)): name for name in chart.settings()}
    header = ["", "| Value | Default | Meaning |", "|---|---|---|"]
    sections, top = [], []
    for value in chart.documented_values():
        if value.is_map and not value.described:
            sections.append([f"{'#' * (2 + len(value.path))} `{value.name}`", "", value.comment])
            continue
        rows = top if len(value.path) == 1 else sections[-1]
        if not any(line in header[1:] for line in rows):
            rows += header
        sets = f" Sets `{variables[value.name]}`." if value.name in variables else ""
        default = json.dumps(value.default).replace("|", "\\|")
        meaning = value.comment.replace("|", "\\|")
        rows.append(f"| `{value.name}` | `{default}` | {meaning}{sets} |")
    sections.append(["### The rest", *top])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def updated():
    """README.md as it should be."""
    before, rest = README.read_text().split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated())
    print(f"{README.name} is up to date")
