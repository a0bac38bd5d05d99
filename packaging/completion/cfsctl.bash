# bash completion for cfsctl
#
# bash gives the line to cfsctl by COMP_LINE and COMP_POINT.  When it has nothing to say, names of
# files are offered.
complete -o default -C 'COMPLETE=bash cfsctl' cfsctl
