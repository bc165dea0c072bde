"""What the shipped models are, for people who choose one."""

from service.model_config.loader import catalogue, load

# Column "24 GiB card" of `listing` -> size relative to 16-bit weights.
_QUANTISED = {"yes": 1.0, "fp8": 0.5, "4 bits": 0.3}
# Weights that leave 4 GiB of a 24 GiB card to the cache: vLLM takes 92 % of it, and some 3 GiB are
# for its graphs and activations (preflight/fit.py).
_ROOM_GIB = 15


def listing(word: str = "") -> list[dict[str, str]]:
    """Return what is known of each shipped model without its files, by family.

    With `word`, only those that have it in their name, family or chapter. The column "24 GiB card"
    is "yes" where the weights leave room for a cache, else the quantisation with which they do. A
    YAML whose longest request would not fit into that cache has engine.max_model_len.
    """
    rows = []
    for name, file in catalogue().items():
        config, _ = load(name, file=file)
        about, source = config.about, config.source
        size = about.weights_gib(config.dtype)
        fits = (
            ""
            if size is None
            else next(
                (text for text, share in _QUANTISED.items() if size * share <= _ROOM_GIB), "no"
            )
        )
        row = {
            "model": name,
            "family": about.family,
            "parameters": "" if about.parameters is None else f"{about.parameters:g}B",
            "weights": "" if size is None else f"{size:.1f} GiB",
            "24 GiB card": fits,
            "chapter": about.chapter,
            "style": config.prompt.style,
            "source": source.modelscope or source.path or source.embedded or "",
            "description": config.description,
        }
        if word.lower() in f"{name} {about.family} {about.chapter}".lower():
            rows.append(row)
    return sorted(rows, key=lambda row: (row["family"], row["model"]))
