/*
 * Kills a process at its n-th system call that changes a file system, with ptrace and seccomp.
 *
 * The child calls cfs_be_traced and goes on; its parent calls cfs_kill_at.  The kernel stops each
 * thread of the child before every such call, and no other.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define STOP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE)
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* Stops at a call. */
#define AT(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, 1), STOP

int cfs_be_traced(void);
int cfs_kill_at(int pid, long nr_kill, long *nr_calls, int *status);

int cfs_be_traced(void)
{
	struct sock_filter filter[] = {
		LOAD(nr),
		AT(write), AT(pwrite64), AT(pwritev), AT(writev), AT(ftruncate), AT(fallocate),
		AT(copy_file_range), AT(sendfile), AT(ioctl), AT(fchmod), AT(fchmodat), AT(fsync),
		AT(fdatasync), AT(syncfs), AT(sync_file_range), AT(linkat), AT(symlinkat), AT(renameat2),
		AT(unlinkat), AT(mkdirat), AT(fsetxattr),
#ifdef __NR_rename
		AT(link), AT(symlink), AT(rename), AT(unlink), AT(mkdir), AT(rmdir),
#endif
#ifdef __NR_renameat
		AT(renameat),
#endif
		/* openat with O_CREAT or O_TMPFILE */
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_openat, 0, 3),
		LOAD(args[2]),
		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | (O_TMPFILE & ~O_DIRECTORY), 0, 1),
		STOP,
		ALLOW,
	};
	struct sock_fprog program = {
		.len = sizeof(filter) / sizeof(filter[0]),
		.filter = filter,
	};

	if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
		return -errno;
	/* the parent sets its options now; without them the stops would be errors */
	raise(SIGSTOP);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		return -errno;
	return 0;
}

/* Waits for the process and all its threads to end, and counts their calls. */
int cfs_kill_at(int pid, long nr_kill, long *nr_calls, int *status)
{
	const long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK |
			     PTRACE_O_TRACEVFORK | PTRACE_O_EXITKILL;
	int stop;
	pid_t id;

	*nr_calls = 0;
	*status = 0;
	if (waitpid(pid, &stop, __WALL) != pid || !WIFSTOPPED(stop))
		return -ECHILD;
	if (ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *)options))
		return -errno;
	ptrace(PTRACE_CONT, pid, NULL, NULL);
	while ((id = waitpid(-1, &stop, __WALL)) > 0) {
		unsigned long signal = 0;

		if (!WIFSTOPPED(stop)) {
			if (id == pid)
				*status = stop;
			continue;
		}
		if (stop >> 16 == PTRACE_EVENT_SECCOMP) {
			if (++*nr_calls == nr_kill) {
				kill(pid, SIGKILL);
				continue;
			}
		} else if (stop >> 16 == 0 && WSTOPSIG(stop) != SIGSTOP &&
			   WSTOPSIG(stop) != SIGTRAP) {
			signal = (unsigned long)WSTOPSIG(stop);
		}
		ptrace(PTRACE_CONT, id, NULL, (void *)signal);
	}
	return errno == ECHILD ? 0 : -errno;
}
