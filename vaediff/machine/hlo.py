"""What an optimized HLO module says of itself: collectives, bytes read and written, how often loops run.

The text is that of `compiled.as_text()`, of the TPU or the GPU compiler.
"""

import math
import re
from typing import Any, NamedTuple

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')


class Instruction(NamedTuple):
  """One line of HLO text: `name = type opcode(rest`."""

  name: str
  type: str
  opcode: str
  rest: str


def collectives(text: str, num_devices: int) -> dict[str, Any]:
  """Returns what a device sends to others in one run of an optimized HLO module.

  The body of a loop counts as often as it runs. A collective that the TPU compiler has spread over several
  fusions, which share its channel and shape, counts once.

  Args:
    text: of the module.
    num_devices: that run it.

  Returns:
    `collective_bytes`: by kind, the bytes of the whole buffers (gathered, reduced, before scattering,
    permuted), without padding; `sent_bytes`: what one device sends of them when the n devices of a group form
    a ring: 2 (n - 1) / n of an all-reduce, (n - 1) / n of the others, all of a permute; `unread_loops`: loops
    whose repetitions are not in the text, counted as one.
  """
  computations = _parse(text)
  repeats, executed, unread = _repeats(computations)
  found = {}
  for computation, instructions in computations.items():
    for index, instruction in enumerate(instructions):
      kind = instruction.opcode.removesuffix('-start')
      if kind not in COLLECTIVES or not repeats[computation]:
        continue
      parts = _elements(instruction.type)
      # an asynchronous start returns its operands too, and then its results
      moved = instruction.type if kind == 'all-reduce' or instruction.opcode == kind else parts[1]
      size, group = type_bytes(moved), _group_size(instruction.rest, num_devices)
      if kind == 'reduce-scatter':
        size *= group
      spread = not executed[computation]
      if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
        spread = False
        kind = 'reduce-scatter'  # how the TPU compiler writes it: an all-reduce and a slice in one fusion
      share = 1.0 if kind == 'collective-permute' else (group - 1) / group
      share *= 2 if kind == 'all-reduce' else 1
      channel = re.search(r'channel_id=(\d+)', instruction.rest)
      identity = (kind, (channel.group(1), size) if spread and channel else (computation, index))
      times = repeats[computation]
      found[identity] = max(found.get(identity, (0, 0)), (times * size, times * size * share))
  return {
    'collective_bytes': {
      kind: sum(size for (name, _), (size, _) in found.items() if name == kind) for kind in COLLECTIVES
    },
    'sent_bytes': sum(sent for _, sent in found.values()),
    'unread_loops': unread,
  }


def accessed_bytes(text: str) -> int:
  """Returns the bytes that the operations of an optimized HLO module read and write, a fusion being one.

  The body of a loop counts as often as it runs. Used where XLA gives no count of its own.
  """
  computations = _parse(text)
  _, executed, _ = _repeats(computations)
  free = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call')
  total = 0
  for computation, instructions in computations.items():
    sizes = {}
    for name, kind, opcode, _ in instructions:  # what follows the result of a library's call is its workspace
      result = _elements(kind)[0] if opcode == 'custom-call' and kind.startswith('(') else kind
      sizes[name] = type_bytes(result)
    for name, _, opcode, rest in instructions if executed[computation] else ():
      if opcode not in free and not opcode.endswith('-done'):
        read = sum(sizes.get(operand, 0) for operand in re.findall(r'%([\w.\-]+)', rest.split('), ', 1)[0]))
        total += executed[computation] * (sizes[name] + read)
  return total


def type_bytes(text: str) -> int:
  """Returns the bytes of an HLO type, `f32[8,4]{1,0}` or a tuple of such, without padding."""
  total = 0
  for kind, dimensions in re.findall(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]', text):
    bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind).group())
    total += math.prod(int(length) for length in dimensions.split(',') if length) * bits // 8
  return total


def _parse(text: str) -> dict[str, list[Instruction]]:
  """Returns the instructions by computation, in the order of the text: the entry is last."""
  computations, instructions = {}, []
  for line in text.splitlines():
    header = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
    if header and not line.startswith('HloModule'):
      instructions = computations.setdefault(header.group(1), [])
      continue
    match = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$', line)
    if match:
      instructions.append(Instruction(*match.groups()))
  return computations


def _repeats(computations: dict[str, list[Instruction]]) -> tuple[dict[str, int], dict[str, int], int]:
  """Returns how often each computation runs, the same without the insides of fusions, and unread loops."""
  repeats, executed, unread = dict.fromkeys(computations, 0), dict.fromkeys(computations, 0), 0
  entry = list(computations)[-1]
  repeats[entry] = executed[entry] = 1
  for name in reversed(computations):  # what is called stands before its caller
    for instruction in computations[name]:
      times = 1
      if instruction.opcode == 'while':
        times = _trip_count(instruction.rest, computations)
        unread += times is None
        times = times or 1
      for attribute, callees in _CALLS.findall(instruction.rest):
        for callee in re.findall(r'[\w.\-]+', callees):
          repeats[callee] = repeats.get(callee, 0) + times * repeats[name]
          if attribute not in ('calls', 'to_apply') or instruction.opcode in ('call', 'async-start'):
            executed[callee] = executed.get(callee, 0) + times * executed[name]
  return repeats, executed, unread


_CALLS = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|'
  r'called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


def _trip_count(rest: str, computations: dict[str, list[Instruction]]) -> int | None:
  """Returns how often a loop runs: as XLA notes it, or from its condition `counter < constant`; else None."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
  if known:
    return int(known.group(1))
  condition = re.search(r'condition=%?([\w.\-]+)', rest)
  bounds = set()
  for _, kind, opcode, after in computations.get(condition.group(1), ()) if condition else ():
    if opcode == 'constant' and re.match(r'[su]\d+\[\]', kind):
      bounds.add(int(after.split(')')[0]))
  return bounds.pop() if len(bounds) == 1 else None


def _elements(text: str) -> list[str]:
  """Returns the members of a tuple type."""
  parts, depth, start = [], 0, 1
  for index, letter in enumerate(text):
    depth += (letter in '([{') - (letter in ')]}')
    if (letter == ',' and depth == 1) or (letter == ')' and depth == 0):
      parts.append(text[start:index].strip())
      start = index + 1
  return parts


def _group_size(rest: str, num_devices: int) -> int:
  """Returns how many devices take part in a collective together, from its `replica_groups`."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  if listed:
    return len(listed.group(1).split(','))
  tiled = re.search(r'replica_groups=\[\d+,(\d+)\]', rest)
  if tiled:
    return int(tiled.group(1))
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}', rest)
  if mesh:
    lengths = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    # an axis, or a part of one: 'axis_0':(2)4 has length 4
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or lengths[axis]) for axis, part in parts)
  return num_devices
