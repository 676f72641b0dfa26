"""Update rules from elsewhere, in float64: what danlu's references are held against."""
