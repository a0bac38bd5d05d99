"""The varlink service: the interfaces of ``varlink/`` over a socket (spec cli-and-varlink b, c)."""
