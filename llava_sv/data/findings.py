"""What `llava-sv data check` can find: a table of kinds, and a tally of what was found. No files are touched here.

`data.check` fills the tally; `data.check_report` shows it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

GROUPS = ("malformed", "record", "missing_image", "corrupt_image")
"""What errors are counted by."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `group`: of an error, which count it belongs to; "" for a warning, which training copes
    with."""

    group: str
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    # errors: training refuses the file, stops at the record, or loses it
    "malformed": Kind("malformed", "Malformed JSON", "Mend the file there, or let --fix keep the whole records."),
    "encoding": Kind("malformed", "Bytes that are no UTF-8", "Save the file as UTF-8."),
    "schema": Kind("record", "Not a LLaVA record", "Give 'conversations', a list of {'from', 'value'} turns."),
    "speaker": Kind("record", "Unknown speaker", "Speakers are 'human' and 'gpt'."),
    "roles": Kind("record", "Speakers do not alternate", "A human asks, gpt answers, in turn."),
    "no_answer": Kind("record", "No question with an answer", "There is nothing to learn; leave it out."),
    "image_count": Kind("record", "Images and <image> differ in number", "Make the two counts equal."),
    "image_in_answer": Kind("record", "<image> in an answer", "Images belong to human turns."),
    "unsafe_path": Kind("record", "Path that leaves the image folder", "Give a path below the image folder."),
    "invalid_unicode": Kind("record", "Half of a surrogate pair", "Write the whole character, or none."),
    "missing_image": Kind("missing_image", "Missing image", "Fetch it, or correct the path."),
    "not_a_file": Kind("corrupt_image", "Image path that is no file", "It names a folder, pipe or device."),
    "empty_image": Kind("corrupt_image", "Empty image file", "Zero bytes: fetch it again."),
    "truncated_image": Kind("corrupt_image", "Truncated image", "Its end is missing: fetch it again."),
    "too_large_image": Kind("corrupt_image", "More pixels than allowed", "Make it smaller, or raise the limit."),
    "corrupt_image": Kind("corrupt_image", "Image that cannot be decoded", "Fetch it again."),
    # warnings: training copes
    "duplicate_id": Kind("", "Id used before", "Nothing breaks; reports name a record by its id."),
    "duplicate_record": Kind("", "Same images and conversation as before", "It counts twice in training."),
    "dropped_turn": Kind("", "Turn that training drops", "An answer before any question, or an unanswered question."),
    "empty_answer": Kind("", "Empty answer", "It teaches to say nothing."),
    "empty_question": Kind("", "Empty question", "Neither words nor an image."),
    "empty_image_field": Kind("", "Field 'image' is empty text", "Leave the field out."),
    "control_characters": Kind("", "Control characters", "They are tokenised as they stand."),
    "byte_order_mark": Kind("", "Byte order mark inside a text", "An invisible character that is tokenised."),
    "special_tokens": Kind("", "Special token written out in a text", "It is broken up and read as text."),
    "too_long": Kind("", "Longer than --max-length", "Training cuts its end off."),
    "huge_image": Kind("", "Very many pixels", "It slows loading down; make it smaller."),
    "tiny_image": Kind("", "Very few pixels", "Little is to be seen in it."),
    "extreme_ratio": Kind("", "Very long and narrow", "Padding or squeezing leaves little of it."),
    "animated": Kind("", "Animation or several pages", "The first frame is taken."),
    "cmyk": Kind("", "CMYK colours", "They are converted to RGB."),
    "rotated": Kind("", "Turned by EXIF", "It is turned upright."),
    "sixteen_bit": Kind("", "More than 8 bits a channel", "The upper eight bits are taken."),
    "transparent": Kind("", "Transparency", "What is transparent becomes white."),
    "wrong_extension": Kind("", "Name and format differ", "It is read by what it holds."),
}
ERRORS = tuple(name for name, kind in KINDS.items() if kind.group)
WARNINGS = tuple(name for name, kind in KINDS.items() if not kind.group)


@dataclass
class Finding:
    """One thing found. `message`: one line. `line`: of the file, 0 if unknown. `image`: the reference, "" if none.
    `thumbnail`: a data URI, or ""."""

    kind: str
    message: str
    line: int = 0
    record: str = ""
    image: str = ""
    thumbnail: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        severity = "error" if KINDS[self.kind].group else "warning"
        values = {"kind": self.kind, "severity": severity, "line": self.line, "record": self.record}
        return {**values, "image": self.image, "message": self.message}


@dataclass
class Tally:
    """All findings counted; of each kind the first `limit` kept, and the lines of the first `shown_limit` errors."""

    limit: int
    shown_limit: int
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Finding]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count one."""
        self.counts[finding.kind] += 1
        some = self.kept.setdefault(finding.kind, [])
        if len(some) < self.limit:
            some.append(finding)
        if KINDS[finding.kind].group and len(self.shown) < self.shown_limit:
            self.shown.append(finding.message)

    def wants(self) -> frozenset[str]:
        """Kinds of which more are kept: the others need no thumbnail."""
        return frozenset(kind for kind in KINDS if len(self.kept.get(kind, ())) < self.limit)

    @property
    def groups(self) -> dict[str, int]:
        """Errors by group."""
        return {group: sum(self.counts[kind] for kind in ERRORS if KINDS[kind].group == group) for group in GROUPS}

    @property
    def errors(self) -> int:
        """How many errors."""
        return sum(self.counts[kind] for kind in ERRORS)

    @property
    def warnings(self) -> int:
        """How many warnings."""
        return sum(self.counts[kind] for kind in WARNINGS)

    def warned(self) -> list[Finding]:
        """The first warnings of each kind."""
        return [finding for kind in WARNINGS for finding in self.kept.get(kind, [])]
