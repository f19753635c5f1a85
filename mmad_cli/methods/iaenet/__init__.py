"""An ensemble that weighs its experts patch by patch: a re-design after the abstract of IAENet."""
