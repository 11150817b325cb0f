"""Small faults in a module, as cosmic-ray lists them: one from each place, in an order that a seed decides."""

import ast
import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """One fault. `module` is a path from the root; the rest says what cosmic-ray is to do, and where that is."""

    module: str
    operator: str  # cosmic-ray's name, such as core/NumberReplacer
    occurrence: int  # among those of the operator in the module
    line: int
    source: str  # the module's text

    @cached_property
    def text(self) -> str:
        """The module with the fault."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        return mutate_code(self.source, get_operator(self.operator)(), self.occurrence)

    @cached_property
    def change(self) -> tuple[str, str]:
        """The lines that differ, before and after, each without its indentation."""
        before, after = self.source.splitlines(), self.text.splitlines()
        while before and after and before[0] == after[0]:
            del before[0], after[0]
        while before and after and before[-1] == after[-1]:
            del before[-1], after[-1]
        return _stripped(before), _stripped(after)

    @property
    def is_one(self) -> bool:
        """Whether it is Python, and differs in more than annotations."""
        try:
            return _meaning(self.text) != _meaning(self.source)
        except SyntaxError:
            return False


def _stripped(lines: list[str]) -> str:
    return "\n".join(line.strip() for line in lines)


class _Bare(ast.NodeTransformer):
    """Without annotations: as values they hardly matter, and a fault in one fails at once."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _meaning(text: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(text)))


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def mutations(module: str, source: str, seed: int) -> list[tuple[str, Mutation]]:
    """(key, fault) for each place in a module that an operator can change; the key says where it is in the order.

    A place is a token and a kind of change, such as a comparison; which of the kind's replacements it gets, the seed
    decides. Keys depend on the text of the line, not on its number or its module's other lines.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, lines = list(ast_nodes(get_ast(source))), source.splitlines()
    places: dict[tuple, dict[tuple[str, int], Mutation]] = {}
    for name in operator_names():
        try:
            operator = get_operator(name)()
        except TypeError:
            continue  # it wants to be told names of variables
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, stop) in enumerate(positions):
            choices = places.setdefault((start, stop, name.rpartition("/")[2].partition("_")[0]), {})
            index = sum(other == name for other, _ in choices)  # a number becomes the one above or below
            choices[name, index] = Mutation(module, name, occurrence, start[0], source)
    seen, found = Counter(), []
    for ((row, column), _, kind), choices in sorted(places.items()):
        text = lines[row - 1]
        place = (module, text.strip(), column - len(text) + len(text.lstrip()), kind)
        key = _digest(seed, *place, seen[place])
        seen[place] += 1
        found.append((key, choices[min(choices, key=lambda choice: _digest(key, *choice))]))
    return found


def sample(root: Path, modules: list[str], n: int, seed: int) -> list[Mutation]:
    """The first `n` faults of the modules in the seed's order: a change of one module moves few of the others'."""
    ordered = sorted(
        (found for module in modules for found in mutations(module, (root / module).read_text(), seed)),
        key=lambda found: found[0],
    )
    chosen = []
    for _, mutation in ordered:
        if len(chosen) == n:
            break
        if mutation.is_one:
            chosen.append(mutation)
    return chosen
