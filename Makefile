# Short names; the work is in scripts/.
.PHONY: demo test long
demo:
	./scripts/demo
test:
	./scripts/test
long:
	./scripts/test --long
