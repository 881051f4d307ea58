"""Random JSON schemas: nested objects, arrays, enums, const, anyOf, $ref, strings, numbers and bounds."""

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ["name", "size", "first_name", "löschen", "a b", 'say "hi"', "x", "日本", "tags", "id", "back\\slash", "note"]
PATTERNS = ["^[a-z]{2,6}$", "^(red|green)-[0-9]{1,3}$", "^[A-Z][a-z]*$", "[0-9]+$", "^x", "^\\d{4}-\\d{2}$"]
FORMATS = ["date", "ipv4", "ipv6", "uuid", "email", "date-time", "time", "duration", "hostname", "uri"]


def string(rng: random.Random) -> Schema:
    kind = rng.randrange(5)
    if kind == 0:
        low = rng.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(5)}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 2:
        return {"type": "string", "format": rng.choice(FORMATS)}
    return {"type": "string", "minLength": rng.randrange(3)} if kind == 3 else {"type": "string"}


def number(rng: random.Random) -> Schema:
    kind, low = rng.choice(["integer", "number"]), rng.randrange(-50, 50)
    out: Schema = {"type": kind}
    if rng.random() < 0.6:
        out[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        out[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randrange(3, 200)
    if kind == "number" and rng.random() < 0.5 and "minimum" in out:
        out["minimum"] = low - 0.75
    if kind == "integer" and rng.random() < 0.3:
        out["multipleOf"] = rng.choice([2, 5])
    return out


def choice(rng: random.Random) -> Schema:
    values = [*WORDS, 0, -3, 2.5, True, False, None, ["a", 1], {"k": [None]}, ""]
    if rng.random() < 0.4:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    out: Schema = {"type": "array", "items": schema(rng, depth - 1), "minItems": low}
    if rng.random() < 0.7:
        out["maxItems"] = low + rng.randrange(3)
    if rng.random() < 0.2:
        out["prefixItems"] = [schema(rng, depth - 1)]
    return out


def obj(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randrange(1, 4))
    out: Schema = {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names}}
    out["required"] = [name for name in names if rng.random() < 0.6]
    kind = rng.randrange(3)
    if kind == 0:
        out["additionalProperties"] = False
    elif kind == 1:
        out["additionalProperties"] = schema(rng, 0)
    return out


def schema(rng: random.Random, depth: int) -> Schema:
    kinds = ["string", "number", "choice", "boolean", "null", "nullable"]
    if depth > 0:
        kinds += ["object", "object", "array", "anyOf", "ref", "ref"]
    kind = rng.choice(kinds)
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "nullable":
        return {"type": [rng.choice(["string", "integer", "boolean"]), "null"], "description": "may be absent"}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(['tree', 'point', 'word'])}"}
    flat = {"string": string, "number": number, "choice": choice}
    return flat[kind](rng) if kind in flat else (obj if kind == "object" else array)(rng, depth)


def random_schema(seed: int) -> Schema:
    """A schema of an object or an array. It is another one for each seed."""
    rng = random.Random(seed)
    top = obj(rng, 3) if rng.random() < 0.8 else array(rng, 3)
    tree = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {
        "anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required": ["value", "next"],
        "additionalProperties": False}  # fmt: skip
    point = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Schema {seed}", **top,
            "$defs": {"tree": tree, "point": point, "word": string(rng)}}  # fmt: skip
