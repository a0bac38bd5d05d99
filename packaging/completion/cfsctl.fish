# fish completion for cfsctl

function __cfsctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l lines (COMPLETE=fish cfsctl -- $words[2..-1] "$current" 2>/dev/null)
    test (count $lines) -gt 1; and printf '%s\n' $lines[2..-1]
    switch "$lines[1]"
        case files
            __fish_complete_path "$current"
        case directories
            __fish_complete_directories "$current"
    end
end

complete -c cfsctl -f -a '(__cfsctl_complete)'
