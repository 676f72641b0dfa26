// The one list of rules: RULE(name in Python, struct, header in rules/). CMake generates one instance file
// from each line.
RULE(lion, Lion, lion)
RULE(tiger, Tiger, tiger)
RULE(adamw, AdamW, adam)
RULE(adam, Adam, adam)
RULE(adaxw, AdaXW, adax)
RULE(adax, AdaX, adax)
RULE(adaxw_inside, AdaXWInside, adax)
RULE(adax_inside, AdaXInside, adax)
