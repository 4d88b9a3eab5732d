"""How each torch operation carries live channels."""
