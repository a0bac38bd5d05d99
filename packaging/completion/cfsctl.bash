# bash completion for cfsctl and the tools of composefs
#
# bash gives the line to cfsctl by COMP_LINE and COMP_POINT.  When it has nothing to say, names of
# files are offered.
complete -o default -C 'COMPLETE=bash cfsctl' \
    cfsctl mkcomposefs composefs-info mount.composefs mount.fuse.composefs
