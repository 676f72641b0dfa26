// The one list of rules: RULE(name in Python, struct, header in rules/), and REDUCING_RULE for those that sum
// over tensors or see states of another shape. CMake generates one instance file from each line.
RULE(lion, Lion, lion)
RULE(tiger, Tiger, tiger)
RULE(adamw, AdamW, adam)
RULE(adam, Adam, adam)
RULE(adaxw, AdaXW, adax)
RULE(adax, AdaX, adax)
RULE(adaxw_inside, AdaXWInside, adax)
RULE(adax_inside, AdaXInside, adax)

// not optimizers, but what is done around them
RULE(accumulate, Accumulate, accumulate)
RULE(average, Average, average)
RULE(lookahead, Lookahead, lookahead)

#ifdef REDUCING_RULE
REDUCING_RULE(tiger_matrix, TigerMatrix, tiger)
REDUCING_RULE(tiger_rows, TigerRows, tiger)
REDUCING_RULE(lamb, Lamb, lamb)
REDUCING_RULE(adafactor, Adafactor, adafactor)
REDUCING_RULE(adafactor_momentum, AdafactorMomentum, adafactor)
REDUCING_RULE(adafactor_factored, AdafactorFactored, adafactor)
REDUCING_RULE(adafactor_factored_momentum, AdafactorFactoredMomentum, adafactor)
REDUCING_RULE(adafactor_factored_root, AdafactorFactoredRoot, adafactor)
REDUCING_RULE(adafactor_factored_root_momentum, AdafactorFactoredRootMomentum, adafactor)
REDUCING_RULE(amos_elementwise, AmosElementwise, amos)
REDUCING_RULE(amos_elementwise_momentum, AmosElementwiseMomentum, amos)
REDUCING_RULE(amos_rows, AmosRows, amos)
REDUCING_RULE(amos_rows_momentum, AmosRowsMomentum, amos)
REDUCING_RULE(amos_columns, AmosColumns, amos)
REDUCING_RULE(amos_columns_momentum, AmosColumnsMomentum, amos)
#endif
