"""One module per optimizer family: names, defaults, formula, reference, coefficients."""
