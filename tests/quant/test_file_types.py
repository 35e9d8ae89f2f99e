from griffin_gguf.quant.file_types import FILE_TYPES, RECIPE, type_name


def test_type_names() -> None:
    for name, recipe in FILE_TYPES.items():
        assert type_name({"general.file_type": int(recipe.id)}) == name
    assert type_name({}) == "unknown"
    assert type_name({"general.file_type": 999}) == "unknown"
    assert type_name({"general.file_type": 15, RECIPE: "4.25 bits a weight"}) == "4.25 bits a weight"
