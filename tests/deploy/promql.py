"""What a PromQL expression reads: metric names, label matchers and the labels it groups by. Parsed by a PromQL parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

TARGET_LABELS = frozenset({"instance", "job"})  # added by every scrape
OF_A_SCRAPE = {"up": TARGET_LABELS}  # series that Prometheus makes itself
VARIABLES = {"$__rate_interval": "1m", "$model_name": ".*", "$instance": ".*"}  # Grafana's, as it would fill them in


@dataclass
class Reads:
    selectors: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)  # (name, [(label, operator, value)])
    labels: set[str] = field(default_factory=set)  # of `by` and `on`


@dataclass(frozen=True)
class Exposed:
    """The series of one /metrics page: sample name -> label sets."""

    series: dict[str, list[dict[str, str]]]

    @classmethod
    def parse(cls, page: str) -> Exposed:
        series: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                series.setdefault(sample.name, []).append(sample.labels)
        return cls(series)

    def labels(self, name: str) -> frozenset[str]:
        if name in OF_A_SCRAPE:
            return OF_A_SCRAPE[name]
        return frozenset(self.series[name][0]) | TARGET_LABELS

    def faults(self, expr: str, shown: frozenset[str] = frozenset()) -> list[str]:
        """What the expression reads and the page does not hold; `shown`: labels that a legend or a sentence names."""
        found = reads(fill(expr))
        wrong = []
        known: set[str] = set()
        for name, matchers in found.selectors:
            if name not in self.series and name not in OF_A_SCRAPE:
                wrong.append(f"no metric {name}")
                continue
            known |= self.labels(name)
            wrong += [f"{name} has no label {label}" for label, _, _ in matchers if label not in self.labels(name)]
            own = [matcher for matcher in matchers if matcher[0] not in TARGET_LABELS]
            if name in self.series and not any(all(_fits(labels, m) for m in own) for labels in self.series[name]):
                wrong.append(f"no series of {name} has {own}")
        wrong += [f"no label {label} to group by" for label in found.labels - known]
        kept = found.labels or known
        return wrong + [f"no label {label} to show" for label in shown - kept]


def _fits(labels: dict[str, str], matcher: tuple[str, str, str]) -> bool:
    name, operator, value = matcher
    have = labels.get(name, "")
    same = have == value if operator in ("=", "!=") else re.fullmatch(value, have) is not None
    return same is (not operator.startswith("!"))


def fill(expr: str) -> str:
    """The expression with Grafana's variables filled in."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def reads(expr: str) -> Reads:
    found = Reads()

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            _select(found, node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            _select(found, node)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.labels |= set(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            found.labels |= set(node.modifier.matching.labels)
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def _select(found: Reads, selector: promql_parser.VectorSelector) -> None:
    matchers = [(m.name, _operator(m.op), m.value) for m in selector.matchers.matchers]
    found.selectors.append((selector.name or "", matchers))


def _operator(op: promql_parser.MatchOp) -> str:
    kinds = promql_parser.MatchOp
    return next(sign for kind, sign in ((kinds.Equal, "="), (kinds.NotEqual, "!="), (kinds.Re, "=~"), (kinds.NotRe, "!~")) if kind == op)
