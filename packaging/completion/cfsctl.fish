# fish completion for cfsctl and the tools of composefs

function __cfsctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l tool (string match -v cfsctl (basename $words[1]))
    set -l lines (COMPLETE=fish cfsctl -- $tool $words[2..-1] "$current" 2>/dev/null)
    test (count $lines) -gt 1; and printf '%s\n' $lines[2..-1]
    set -l before '^(?:-[^=]*=)?(?:(?:unix|oci|oci-archive|docker-archive|dir):)?'
    set -l option (string match -r $before -- "$current")
    set -l value (string replace -r $before '' -- "$current")
    set -l paths
    switch "$lines[1]"
        case files
            set paths (__fish_complete_path "$value")
        case directories
            set paths (__fish_complete_directories "$value")
    end
    for path in $paths
        printf '%s%s\n' "$option" $path
    end
end

for program in cfsctl mkcomposefs composefs-info mount.composefs mount.fuse.composefs
    complete -c $program -f -a '(__cfsctl_complete)'
end
