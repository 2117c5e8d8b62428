"""What no sample goes into: weights, tables, constants, sizes. Each part of a network makes them where it uses them."""

from collections.abc import Iterator, Mapping

from torch import fx, nn

from ondevice_trgl.model.inplace import RANDOM, changes_its_input, operation, writers


def fetched(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes of `graph` that depend on no sample, are the same each time, and cross no boundary therefore.

    Of the input they know the batch size and the device, which every boundary has too.
    """
    start = next(node for node in graph.nodes if node.op == "placeholder")
    found: set[fx.Node] = set()
    fresh: set[fx.Node] = set()  # their memory is their own
    for node in graph.nodes:
        if node.op == "get_attr" or reads_input(node, start):
            found.add(node)
        elif node.op in ("call_function", "call_method") and operation(node) not in RANDOM:
            inputs = node.all_input_nodes
            if not all(before in found for before in inputs):
                continue
            if not changes_its_input(node, modules):
                found.add(node)
                if operation(node) == "clone" or not any("shape" in before.meta for before in inputs):
                    fresh.add(node)
            elif isinstance(node.args[0], fx.Node) and node.args[0] in fresh and list(node.args[0].users) == [node]:
                found.add(node)
                fresh.add(node)
    stays = {node for node in found if node.op == "get_attr" or reads_input(node, start)}
    changing = {node for node in stays if any(writer not in found for writer in writers(node, modules))}
    dropped = True
    while dropped:
        dropped = False
        for node in [node for node in graph.nodes if node in found - stays]:
            inputs = node.all_input_nodes
            outdated = any(before not in found or before in changing for before in inputs)
            if outdated or any(writer not in found for writer in writers(node, modules)):
                found.discard(node)
                dropped = True
    return found


def reads_input(node: fx.Node, start: fx.Node) -> bool:
    """Whether `node` reads the batch size or the device of the network's input `start`."""
    return list(node.args) in ([start, 0], [start, "device"]) and operation(node) in ("size", "getattr")


def uses(node: fx.Node, found: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes outside of `found` that use the value of `node`, or what is made of it inside."""
    for user in node.users:
        if user in found:
            yield from uses(user, found)
        else:
            yield user
