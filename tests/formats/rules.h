// The rules that are built with the formats of toy.h.
RULE(adamw, AdamW, adam)
