// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcow2 images: qemu-img makes and judges them, qemu-nbd reads and writes them; here
 * are only their calls. Both get an open file, so that no name is taken for more than
 * a name, and are told to leave the backing file alone. qemu-nbd serves the one end of
 * a connection that was there before it, and ends with that, and with us.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cowctl.h"
#include "image.h"
#include "nbd-calls.h"

#define PACKAGE		"qemu-utils"
#define TOOL_MS		60000
#define CHECK_MS	3600000		/* it reads all tables */
#define OWN_BYTES	(1024 << 10)	/* of what qemu-img prints */
#define HEADER_BYTES	104		/* of a qcow2 image, at least */
#define CLUSTER_BYTES	(128 << 10)	/* of those that are made here */
#define LISTEN_FD	3		/* that is passed as systemd does it */
#define IMAGE_FD	4
#define CONTEXT_DEPTH	"qemu:allocation-depth"
#define ZERO_BYTES	(UINT64_C(1) << 30)
#define END_MS		30000
#define STATUS_BYTES	(UINT64_C(1) << 30)

/*
 * qemu-img
 */

/* What qemu says after the names of programs and files. */
static const char *reason(const char *message)
{
	const char *found = message;

	for (const char *s = message; (s = strstr(s, ": ")); s += 2)
		found = s + 2;
	return *found ? found : "no reason given";
}

/* The image without what it names: neither its backing file nor others are opened. */
static char *alone(int fd, const char *more)
{
	static const char options[] = "\"driver\":\"qcow2\",\"backing\":null";
	static const char file[] = "\"file.filename\":\"/proc/self/fd";
	struct stat st;
	bool device = !fstat(fd, &st) && S_ISBLK(st.st_mode);

	return xasprintf("json:{%s%s,\"file.driver\":\"%s\",%s/%d\"}", options, more,
			 device ? "host_device" : "file", file, fd);
}

static int to_file(void *arg)
{
	return dup2(*(int *)arg, STDOUT_FILENO) < 0;
}

/*
 * Runs qemu-img for an image. What it prints goes to @info, if that is wanted; @told is
 * then whether it did. Return: its exit status, or -errno with the message printed.
 */
static int qemu_img(const struct image *image, const char *const *argv, int timeout_ms,
		    char message[512], struct image_info *info, bool *told)
{
	int fd = info ? memfd_create("qemu-img", MFD_CLOEXEC) : -1, ret;
	struct run qemu = {
		.argv = argv, .package = PACKAGE, .timeout_ms = timeout_ms,
		.keep_fd = image->fd, .in_child = info ? to_file : NULL, .arg = &fd,
	};
	char *text;

	if (info && fd < 0)
		return fail(-errno, "cannot make a file in memory: %m");
	ret = run(&qemu);
	snprintf(message, 512, "%s", qemu.message);
	if (info) {
		text = calloc(1, OWN_BYTES);
		*told = text && pread(fd, text, OWN_BYTES - 1, 0) > 0 &&
			!parse_image_info(text, info);
		free(text);
		close(fd);
	}
	return ret;
}

/* Makes the file an empty image on top of @backing, which need not be there. */
int image_create(struct image *image, uint64_t bytes, const char *backing, const char *format)
{
	char *path = xasprintf("/proc/self/fd/%d", image->fd), message[512];
	char *size = xasprintf("%llu", (unsigned long long)bytes);
	/* Parts of a cluster as small as our blocks: the rest of it need not be read. */
	char *options = xasprintf("extended_l2=on,cluster_size=%d", CLUSTER_BYTES);
	const char *const argv[] = {
		"qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", options, "-b", backing,
		"-F", format, path, size, NULL,
	};
	int ret = qemu_img(image, argv, TOOL_MS, message, NULL, NULL);

	if (ret > 0 && strstr(message, "extended_l2"))
		ret = fail(-ENOPKG, "qemu-img is too old; it must be of QEMU 5.2 or newer");
	else if (ret > 0 && strstr(message, "backing-fmt"))
		ret = fail(-EINVAL, "format=%s is none that qemu-img knows (raw, qcow2)", format);
	else if (ret > 0)
		ret = fail(-EIO, "cannot make %s: %s", image->path, reason(message));
	image->bytes = bytes;
	free(path);
	free(size);
	free(options);
	return ret;
}

/*
 * Whether a file is a qcow2 image that stands for itself. That it has its data in
 * another file has to be seen before qemu opens it, which would open that, too.
 */
static int check_header(const struct image *image)
{
	unsigned char header[HEADER_BYTES];
	ssize_t n = pread(image->fd, header, sizeof(header), 0);

	if (n < 0)
		return fail(-errno, "cannot read %s: %m", image->path);
	if (n != sizeof(header) || memcmp(header, "QFI\xfb", 4))
		return fail(-EIO, "%s is no qcow2 image", image->path);
	/* bit 2 of the incompatible features, which version 2 does not have */
	if (header[7] > 2 && header[79] & 4)
		return fail(-EIO, "%s is not whole: its data are in another file", image->path);
	return 0;
}

/* Says what qemu thinks of the image. image_info_free() is for @info in any case. */
int image_examine(const struct image *image, struct image_info *info)
{
	char *name = alone(image->fd, ""), message[512];
	const char *const argv[] = { "qemu-img", "info", "--output=json", name, NULL };
	int ret = check_header(image);
	bool told = false;

	memset(info, 0, sizeof(*info));
	if (!ret)
		ret = qemu_img(image, argv, TOOL_MS, message, info, &told);
	if (ret > 0 || (!ret && !told))
		ret = fail(-EIO, "%s cannot be used: %s", image->path, reason(message));
	if (!ret && info->encrypted)
		ret = fail(-EIO, "%s is encrypted", image->path);
	free(name);
	return ret;
}

/*
 * Whether the image is sound. qemu-img does not mind when less than a cluster is
 * missing at the end, which would be read as zeroes; only one that holds nothing is
 * as short as that, or one whose last cluster is compressed, which cannot be expanded
 * then. So @image->cut is set where it may be that something is missing.
 */
int image_check(struct image *image)
{
	char *name = alone(image->fd, ""), message[512];
	const char *const argv[] = { "qemu-img", "check", "--output=json", name, NULL };
	struct image_info info = { 0 };
	bool told = false;
	int ret = qemu_img(image, argv, CHECK_MS, message, &info, &told);
	struct stat st;

	/* 1: it was not checked; so it is when nothing is told of it */
	if (ret >= 0 && !told)
		ret = 1;
	if (ret == 2)
		ret = fail(-EIO, "%s is damaged; \"qemu-img check\" tells more", image->path);
	/* 3: some of it is not in use any more */
	else if (ret > 0 && ret != 3)
		ret = fail(-EIO, "%s cannot be checked: %s", image->path, reason(message));
	else if (ret >= 0)
		image->cut = !fstat(image->fd, &st) && S_ISREG(st.st_mode) &&
			     (uint64_t)st.st_size < info.end && !info.compressed;
	image_info_free(&info);
	free(name);
	return ret > 0 ? 0 : ret;
}

/* Fills the last cluster, so that image_check() sees when something is missing. */
int image_pad(const struct image *image)
{
	struct stat st;

	if (fstat(image->fd, &st) ||
	    ftruncate(image->fd, (st.st_size + CLUSTER_BYTES - 1) / CLUSTER_BYTES * CLUSTER_BYTES))
		return fail(io_error(errno), "cannot write %s: %m", image->path);
	return 0;
}

/*
 * qemu-nbd
 */

static void __attribute__((noreturn))
become_server(const struct image *image, int listener, int messages, bool read_only, pid_t parent)
{
	/* Tables are written in order: each as a whole, and there is no need to keep many. */
	static const char tables[] =
		",\"l2-cache-entry-size\":131072,\"l2-cache-size\":4194304";
	char *name = alone(IMAGE_FD, read_only ? "" : tables), pid[24];
	const char *const argv[] = {
		"qemu-nbd", "--cache=unsafe", read_only ? "--read-only" : "--discard=unmap",
		read_only ? "--allocation-depth" : "--detect-zeroes=off", name, NULL,
	};
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	sigset_t none;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(126);
	/* What a terminal sends to us is for us to act on. */
	setpgid(0, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* out of the way of those that are given out next */
	listener = fcntl(listener, F_DUPFD_CLOEXEC, 10);
	messages = fcntl(messages, F_DUPFD_CLOEXEC, 10);
	if (dup2(fcntl(image->fd, F_DUPFD_CLOEXEC, 10), IMAGE_FD) < 0 ||
	    dup2(listener, LISTEN_FD) < 0)
		_exit(126);
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	dup2(messages, STDERR_FILENO);
	snprintf(pid, sizeof(pid), "%ld", (long)getpid());
	setenv("LISTEN_PID", pid, 1);
	setenv("LISTEN_FDS", "1", 1);
	unsetenv("LISTEN_FDNAMES");
	execvp(argv[0], (char *const *)argv);
	_exit(errno == ENOENT ? 127 : 126);
}

/* Connected before there is a server, and without a name after that: it is all ours. */
static int make_connection(int *listener, int *client)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int err = 0;

	snprintf(addr.sun_path, sizeof(addr.sun_path), RUN_DIR "/%ld.image", (long)getpid());
	unlink(addr.sun_path);
	*listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	*client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	/* Others may not connect before it is bound; then its mode keeps them away. */
	if (*listener < 0 || *client < 0 || fchmod(*listener, 0600) ||
	    bind(*listener, (struct sockaddr *)&addr, sizeof(addr)) || listen(*listener, 1) ||
	    connect(*client, (struct sockaddr *)&addr, sizeof(addr)))
		err = -errno;
	unlink(addr.sun_path);
	return err;
}

/* Waits for the server, which ends with its only client. Return: its status, or -1. */
static int wait_for_server(const struct image *image)
{
	struct pollfd fds[] = {
		{ .fd = pidfd_open(image->pid, 0), .events = POLLIN },
		{ .fd = image->signals, .events = POLLIN },
	};
	int status = -1;

	poll(fds, 2, END_MS);
	if (!fds[0].revents)
		kill(image->pid, SIGKILL);
	waitpid(image->pid, &status, 0);
	close(fds[0].fd);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int fail_server(struct image *image)
{
	char text[4096] = "", line[512] = "";
	ssize_t n;
	int status;

	if (interrupted())
		return -EINTR;
	/* without its client it ends, if it has not done so */
	nbd.close(image->handle);
	image->handle = NULL;
	status = wait_for_server(image);
	image->pid = 0;
	n = read(image->message_fd, text, sizeof(text) - 1);
	text[n > 0 ? n : 0] = '\0';
	last_line(text, line, sizeof(line));
	if (status == 127)
		return fail(-ENOPKG, "qemu-nbd is not installed; it is in the package " PACKAGE);
	if (strstr(text, "--allocation-depth"))
		return fail(-ENOPKG, "qemu-nbd is too old; it must be of QEMU 5.2 or newer");
	return fail(-EIO, "qemu-nbd cannot open %s: %s", image->path, reason(line));
}

/* Lets libnbd go on when its server has sent something, or can be sent more. */
static int progress(struct image *image)
{
	unsigned int direction = nbd.aio_get_direction(image->handle);
	struct pollfd fds[] = {
		{
			.fd = nbd.aio_get_fd(image->handle),
			.events = (direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
				  (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0),
		},
		{ .fd = image->signals, .events = POLLIN },
	};
	int ret = 0;

	if (fds[0].fd < 0)
		return -EIO;
	if (poll(fds, 2, -1) < 0)
		return errno == EINTR ? 0 : -errno;
	if (fds[1].revents)
		return -EINTR;
	if (fds[0].revents & (POLLIN | POLLHUP | POLLERR) &&
	    direction & LIBNBD_AIO_DIRECTION_READ)
		ret = nbd.aio_notify_read(image->handle);
	else if (fds[0].revents)
		ret = nbd.aio_notify_write(image->handle);
	return ret ? -EIO : 0;
}

/* libnbd is to close the client. */
static int connect_image(struct image *image, int client, bool read_only)
{
	int err = 0;

	image->handle = nbd.create();
	if (!image->handle ||
	    (read_only && (nbd.add_meta_context(image->handle, LIBNBD_CONTEXT_BASE_ALLOCATION) ||
			   nbd.add_meta_context(image->handle, CONTEXT_DEPTH)))) {
		close(client);
		return fail(-ENOMEM, "out of memory");
	}
	if (nbd.aio_connect_socket(image->handle, client))
		return fail_server(image);
	while (!err && nbd.aio_is_connecting(image->handle) == 1)
		err = progress(image);
	if (err == -EINTR)
		return err;
	if (err || nbd.aio_is_ready(image->handle) != 1)
		return fail_server(image);
	if (read_only && nbd.can_meta_context(image->handle, CONTEXT_DEPTH) != 1)
		return fail(-ENOPKG, "qemu-nbd is too old; it must be of QEMU 5.2 or newer");
	return 0;
}

/* Has the image served; image_end() is to follow whatever happens. */
int image_start(struct image *image, bool read_only)
{
	int listener, client, messages[2], err;
	pid_t self = getpid();

	image->signals = open_stop_signals();
	image->message_fd = -1;
	if (!load_libnbd())
		return fail(-ENOPKG, "the package libnbd0 is missing");
	image->bufs = aligned_alloc(BLOCK_BYTES, IMAGE_SLOTS * IMAGE_SLOT_BYTES);
	if (!image->bufs)
		return fail(-ENOMEM, "out of memory");
	for (int i = 0; i < IMAGE_SLOTS; i++)
		image->slots[i] = (struct slot){
			.image = image, .buf = image->bufs + (size_t)i * IMAGE_SLOT_BYTES,
		};
	if (pipe2(messages, O_CLOEXEC | O_NONBLOCK))
		return fail(-errno, "cannot make a pipe: %m");
	image->message_fd = messages[0];
	err = make_connection(&listener, &client);
	if (!err) {
		image->pid = fork();
		if (!image->pid)
			become_server(image, listener, messages[1], read_only, self);
		if (image->pid < 0) {
			err = -errno;
			image->pid = 0;
		}
	}
	close(messages[1]);
	if (listener >= 0)
		close(listener);
	if (!err)
		return connect_image(image, client, read_only);
	if (client >= 0)
		close(client);
	return fail(err, "cannot start qemu-nbd: %s", strerror(-err));
}

static int fail_request(struct image *image)
{
	if (interrupted())
		return -EINTR;
	return fail(io_error(-image->err), "cannot %s %s: %s", image->pass_on ? "read" : "write",
		    image->path, strerror(-image->err));
}

static int completed(void *arg, int *error)
{
	struct slot *slot = arg;
	struct image *image = slot->image;

	slot->state = image->pass_on && !*error && slot->bytes ? READ : FREE;
	if (*error && !image->err)
		image->err = -*error;
	return 1;
}

/* What a request ends with; there is nothing to free. */
static nbd_completion_callback when_completed(struct slot *slot)
{
	return (nbd_completion_callback){ .callback = completed, .user_data = slot };
}

/* Return: -errno; a free slot in *@found, where @found is not NULL, or none is in use. */
static int wait_for_slots(struct image *image, struct slot **found)
{
	for (;;) {
		bool busy = false;
		int err = 0;

		for (int i = 0; i < IMAGE_SLOTS; i++) {
			struct slot *slot = &image->slots[i];

			if (slot->state == READ) {
				slot->state = FREE;
				err = image->pass_on(image->arg, slot->buf, slot->bytes,
						     slot->offset);
				if (err)
					return err;
			}
			if (slot->state == FREE && found) {
				*found = slot;
				return image->err ? fail_request(image) : 0;
			}
			busy = busy || slot->state != FREE;
		}
		if (!busy)
			return image->err ? fail_request(image) : 0;
		err = progress(image);
		if (err == -EINTR)
			return err;
		if (err) {
			image->err = image->err ?: err;
			return fail_request(image);
		}
	}
}

/* Waits until no request is under way. */
int image_settle(struct image *image)
{
	return wait_for_slots(image, NULL);
}

static int sent(struct image *image, int64_t cookie)
{
	if (cookie >= 0)
		return 0;
	image->err = image->err ?: nbd.get_errno() ? -nbd.get_errno() : -EIO;
	return fail_request(image);
}

/* Return: IMAGE_SLOT_BYTES of memory for image_write(), or NULL with the message printed. */
void *image_buffer(struct image *image, struct slot **slot)
{
	return wait_for_slots(image, slot) ? NULL : (*slot)->buf;
}

int image_write(struct image *image, struct slot *slot, uint64_t offset, size_t bytes)
{
	slot->state = SENT;
	return sent(image, nbd.aio_pwrite(image->handle, slot->buf, bytes, offset,
					  when_completed(slot), 0));
}

int image_zero(struct image *image, uint64_t offset, uint64_t bytes)
{
	int err = 0;

	while (bytes && !err) {
		uint64_t n = bytes < ZERO_BYTES ? bytes : ZERO_BYTES;
		struct slot *slot;

		err = wait_for_slots(image, &slot);
		if (err)
			break;
		slot->state = SENT;
		err = sent(image, nbd.aio_zero(image->handle, n, offset, when_completed(slot), 0));
		offset += n;
		bytes -= n;
	}
	return err;
}

/* What is read is passed on, in any order, until image_settle() has returned. */
int image_read(struct image *image, uint64_t offset, uint64_t bytes)
{
	int err = 0;

	while (bytes && !err) {
		struct slot *slot;

		err = wait_for_slots(image, &slot);
		if (err)
			break;
		slot->offset = offset;
		slot->bytes = bytes < IMAGE_SLOT_BYTES ? bytes : IMAGE_SLOT_BYTES;
		slot->state = SENT;
		offset += slot->bytes;
		bytes -= slot->bytes;
		err = sent(image, nbd.aio_pread(image->handle, slot->buf, slot->bytes,
						slot->offset, when_completed(slot), 0));
	}
	return err;
}

/* For a request that is alone, and reads and writes nothing. */
static int take_slot(struct image *image, struct slot **slot)
{
	int err = image_settle(image) ?: wait_for_slots(image, slot);

	if (!err) {
		(*slot)->bytes = 0;
		(*slot)->state = SENT;
	}
	return err;
}

int image_flush(struct image *image)
{
	struct slot *slot;
	int err = take_slot(image, &slot);

	if (err)
		return err;
	return sent(image, nbd.aio_flush(image->handle, when_completed(slot), 0)) ?:
	       image_settle(image);
}

/*
 * What is where in the image
 */

/* The answer to one question: of each context, runs of a length and flags. */
struct status {
	struct runs {
		uint32_t *entries;
		size_t n;
	} allocation, depth;
};

static int take_runs(void *arg, const char *context, uint64_t offset, uint32_t *entries, size_t n,
		     int *error)
{
	struct status *status = arg;
	struct runs *runs = strcmp(context, CONTEXT_DEPTH) ? &status->allocation : &status->depth;

	(void)offset;
	free(runs->entries);
	runs->entries = malloc(n * sizeof(*entries));
	runs->n = runs->entries ? n / 2 : 0;
	if (!runs->entries) {
		*error = ENOMEM;
		return -1;
	}
	memcpy(runs->entries, entries, n * sizeof(*entries));
	return 0;
}

static int ask_status(struct image *image, uint64_t offset, struct status *status)
{
	uint64_t left = image->bytes - offset;
	nbd_extent_callback extents = { .callback = take_runs, .user_data = status };
	struct slot *slot;
	int err = take_slot(image, &slot);

	if (err)
		return err;
	return sent(image, nbd.aio_block_status(image->handle,
						left < STATUS_BYTES ? left : STATUS_BYTES, offset,
						extents, when_completed(slot), 0)) ?:
	       image_settle(image);
}

/* Tells of what both contexts know. Return: -errno; up to where in *@offset. */
static int tell_status(struct image *image, uint64_t *offset, const struct status *status,
		       int (*visit)(const struct image_range *range, void *arg), void *arg)
{
	uint64_t ends[2] = { *offset, *offset }, before = *offset;
	size_t i = 0, j = 0;
	int err = 0;

	while (!err && *offset < image->bytes) {
		struct image_range range = { .start = *offset };

		if (ends[0] == *offset && i < status->allocation.n)
			ends[0] += status->allocation.entries[2 * i++];
		if (ends[1] == *offset && j < status->depth.n)
			ends[1] += status->depth.entries[2 * j++];
		range.end = ends[0] < ends[1] ? ends[0] : ends[1];
		if (range.end > image->bytes)
			range.end = image->bytes;
		if (range.end <= range.start)
			break;
		range.zero = status->allocation.entries[2 * i - 1] & LIBNBD_STATE_ZERO;
		range.allocated = status->depth.entries[2 * j - 1];
		err = visit(&range, arg);
		*offset = range.end;
	}
	if (!err && *offset == before)
		err = fail(-EIO, "cannot read %s: qemu-nbd does not tell what is in it",
			   image->path);
	return err;
}

int image_walk(struct image *image, int (*visit)(const struct image_range *range, void *arg),
	       void *arg)
{
	struct status status = { 0 };
	uint64_t offset = 0;
	int err = 0;

	while (!err && offset < image->bytes)
		err = ask_status(image, offset, &status) ?:
		      tell_status(image, &offset, &status, visit, arg);
	free(status.allocation.entries);
	free(status.depth.entries);
	return err;
}

/* Ends all that image_start() has begun. Return: @err, or whether that went well. */
int image_end(struct image *image, int err)
{
	int status = 0;

	if (image->handle)
		nbd.close(image->handle);
	if (image->pid) {
		if (err)
			kill(image->pid, SIGKILL);
		status = wait_for_server(image);
	}
	if (image->message_fd >= 0)
		close(image->message_fd);
	close(image->signals);
	free(image->bufs);
	if (err || !status)
		return err;
	return interrupted() ? -EINTR : fail(-EIO, "qemu-nbd has failed to finish %s", image->path);
}
