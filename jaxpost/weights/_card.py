"""The model card: what a model was trained on, how, and under which licence."""

import dataclasses
import json
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What `README.md` of an export says.

    Fields:
        title: name of the model.
        licence: SPDX-like name of the weights' licence ("apache-2.0"), or "other".
        data: data sets it was trained on: name and licence.
        method: how it was trained, a sentence or more.
        base_model: what it was fine-tuned from, if anything.
        task: what the hub lists it under.
        languages: ISO 639-1 codes.
        metrics: measured results: name and value with unit.
        intended_use, limitations: sentences; left out if empty.
        citation: papers of the method.
    """

    title: str
    licence: str
    data: Mapping[str, str]
    method: str
    base_model: str | None = None
    task: str = "text-generation"
    languages: tuple[str, ...] = ("en",)
    metrics: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    intended_use: str = ""
    limitations: str = ""
    citation: str = ""

    def render(self) -> str:
        """The card in Markdown, with the header that the hub reads."""
        return "\n".join([*self._header(), *self._body()]) + "\n"

    def _header(self) -> list[str]:
        # A JSON string is a YAML string, so quoting needs no YAML library.
        quoted = json.dumps
        lines = ["---", f"license: {quoted(self.licence)}"]
        lines += ["library_name: transformers", f"pipeline_tag: {self.task}"]
        lines += [f"language: [{', '.join(map(quoted, self.languages))}]"]
        if self.base_model:
            lines.append(f"base_model: {quoted(self.base_model)}")
        return [*lines, "tags: [jaxpost]", "---", ""]

    def _body(self) -> list[str]:
        lines = [f"# {self.title}", ""]
        if self.base_model:
            lines += [f"Fine-tuned from `{self.base_model}`.", ""]
        lines += ["## Method", "", self.method, "", "## Data", ""]
        if self.data:
            lines += ["| data set | licence |", "|---|---|"]
            lines += [f"| {_cell(n)} | {_cell(v)} |" for n, v in self.data.items()]
        else:
            lines.append("No training data was recorded.")
        lines += ["", "## Licence", "", self.licence, ""]
        if self.metrics:
            lines += ["## Results", "", "| measure | value |", "|---|---|"]
            lines += [f"| {_cell(n)} | {_cell(v)} |" for n, v in self.metrics.items()]
            lines.append("")
        for heading, text in (
            ("Intended use", self.intended_use),
            ("Limitations", self.limitations),
            ("Citation", self.citation),
        ):
            if text:
                lines += [f"## {heading}", "", text, ""]
        lines += [
            "## Files",
            "",
            "Exported by jaxpost in Hugging Face layout; `export_report.json`, if",
            "present, compares the files with the model in memory.",
        ]
        return lines


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
