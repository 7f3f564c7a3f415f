// SPDX-License-Identifier: GPL-2.0-only
/*
 * commit: the changes of a device are written to a copy of its base, or, where that is
 * really meant and nobody else has it, to the base itself.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

#define BUF_BYTES	(1024 << 10)
#define ZERO_BYTES	(UINT64_C(1) << 30)	/* at a time, for signals to be seen */

struct commit {
	const struct args *args;
	const char *path;		/* of the target */
	int fd;
	int lock;			/* of a device */
	struct stat st;
	uint64_t bytes;			/* of the target */
	bool force;
	bool onto_base;
	struct view view;
	char *buf;
	uint64_t sums[KINDS];
	uint64_t done;
	int shown;
	bool show;
};

/* A part of a block device is as good as all of it. */
static bool same_file(const struct stat *a, const struct stat *b)
{
	if (a->st_rdev && b->st_rdev)
		return is_part_of(a->st_rdev, b->st_rdev) || is_part_of(b->st_rdev, a->st_rdev);
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/*
 * Return: the number of a loop device that is attached to the file or block device, other
 * than @but, or 0.
 */
static dev_t find_loop(const struct stat *file, dev_t but)
{
	DIR *dir = opendir("/sys/block");
	struct dirent *entry;
	dev_t found = 0;

	while (dir && !found && (entry = readdir(dir))) {
		char *path = xasprintf("/dev/%s", entry->d_name);
		struct stat loop, its;

		if (!strncmp(entry->d_name, "loop", 4) && !stat(path, &loop) &&
		    loop.st_rdev != but && loop_file(loop.st_rdev, &its) &&
		    same_file(&its, file))
			found = loop.st_rdev;
		free(path);
	}
	if (dir)
		closedir(dir);
	return found;
}

static int fail_in_use(const struct commit *commit, const char *what, char *who)
{
	int err = fail(-EBUSY, "%s %s %s", commit->path, what, who);

	free(who);
	return err;
}

/* Nobody makes a copy of the target from here on, nor writes to it by another commit. */
static int lock_target(struct commit *commit, dev_t dev)
{
	commit->lock = lock_device(dev, LOCK_TRY);
	if (commit->lock == -EBUSY)
		return fail(-EBUSY, "%s is just being used by another cowctl", commit->path);
	return commit->lock < 0 ? commit->lock : 0;
}

/* The base may be written only when this copy is its one user, and its owner means it. */
static int check_base_target(struct commit *commit, dev_t base)
{
	struct holders holders;
	char *where = mounted_on(base);

	commit->onto_base = true;
	find_holders(base, &holders);
	if (where)
		return fail_in_use(commit, "is mounted on", where);
	if (holders.other)
		return fail_in_use(commit, "is in use by", holders.other);
	if (holders.copies > 1)
		return fail(-EBUSY, "%s is the base of other copies, too", commit->path);
	return commit->force ? 0 :
	       fail(-EBUSY, "%s is the base of %s itself; say force=true to change it",
		    commit->path, commit->args->name);
}

/* Writing to a device must not change the base of any copy that is below it. */
static int check_not_on_base(const struct cow *cow, void *arg)
{
	struct commit *commit = arg;
	dev_t base = makedev(cow->table.major, cow->table.minor);

	return !stands_on(NULL, commit->st.st_rdev, &base) ? 0 :
	       fail(-EBUSY, "%s is made of the base of %s", commit->path, cow->name);
}

/* Whether a device may be written, as far as is known without opening it. */
static int check_device(struct commit *commit, const struct cow *cow)
{
	dev_t dev = commit->st.st_rdev, base = makedev(cow->table.major, cow->table.minor);
	dev_t live = makedev(cow->major, cow->minor), other;
	struct stat file;
	char *where;

	other = find_loop(&commit->st, 0);
	if (other)
		return fail_in_use(commit, "is attached to",
				   device_path(major(other), minor(other)));
	other = loop_file(dev, &file) ? find_loop(&file, dev) : 0;
	if (other)
		return fail_in_use(commit, "is the same file as",
				   device_path(major(other), minor(other)));
	if (dev == base)
		return check_base_target(commit, base);
	if (stands_on(NULL, dev, &live))
		return fail(-EBUSY, "%s is %s itself, or made of it", commit->path,
			    commit->args->name);
	if (stands_on(NULL, base, &dev))
		return fail(-EBUSY, "the base of %s is made of %s", commit->args->name,
			    commit->path);
	where = mounted_on(dev);
	return where ? fail_in_use(commit, "is mounted on", where) :
	       dm_each(check_not_on_base, commit);
}

/* Whether what was opened is what was looked at before; its directory may be anybody's. */
static int check_opened(struct commit *commit)
{
	struct stat now;

	if (!fstat(commit->fd, &now) && (now.st_mode & S_IFMT) == (commit->st.st_mode & S_IFMT) &&
	    (S_ISBLK(now.st_mode) ? now.st_rdev == commit->st.st_rdev :
	     now.st_dev == commit->st.st_dev && now.st_ino == commit->st.st_ino))
		return 0;
	return fail(-EBUSY, "%s was replaced meanwhile", commit->path);
}

static int open_device(struct commit *commit, const struct cow *cow)
{
	int err = lock_target(commit, commit->st.st_rdev) ?: check_device(commit, cow);

	if (err)
		return err;
	commit->fd = open(commit->path, O_RDWR | O_DIRECT | O_CLOEXEC |
			  (commit->onto_base ? 0 : O_EXCL));
	if (commit->fd < 0)
		return fail(-errno, errno == EBUSY ? "%s is in use" : "cannot open %s: %m",
			    commit->path);
	err = check_opened(commit);
	if (err)
		return err;
	if (ioctl(commit->fd, BLKGETSIZE64, &commit->bytes))
		return fail(-errno, "cannot get the size of %s: %m", commit->path);
	return 0;
}

/* Whether the target, a file, may be written if the base is a loop device of it. */
static int check_base_file(struct commit *commit, dev_t base)
{
	struct stat file;
	char *dev;
	int err;

	if (!loop_file(base, &file) || !same_file(&file, &commit->st))
		return 0;
	if (!loop_is_part(base))
		return lock_target(commit, base) ?: check_base_target(commit, base);
	/* What is at some place of the base would come to another one of the file. */
	dev = device_path(major(base), minor(base));
	err = fail(-EBUSY, "only a part of %s is the base of %s; say to=%s", commit->path,
		   commit->args->name, dev);
	free(dev);
	return err;
}

static int open_file(struct commit *commit, const struct cow *cow)
{
	struct flock whole = { .l_type = F_WRLCK };
	dev_t base = makedev(cow->table.major, cow->table.minor), other;
	int err;

	/* Who wants it as a base sees from now on that it is open. */
	commit->fd = open(commit->path, O_RDWR | O_CLOEXEC);
	if (commit->fd < 0)
		return fail(-errno, "cannot open %s: %m", commit->path);
	err = check_opened(commit);
	if (err)
		return err;
	other = find_loop(&commit->st, base);
	if (other)
		return fail_in_use(commit, "is attached to",
				   device_path(major(other), minor(other)));
	err = check_base_file(commit, base);
	if (err)
		return err;
	/*
	 * A loop device has the base open. A virtual machine locks some of what it has; a file
	 * system need not know locks, or leases.
	 */
	if ((!commit->onto_base && has_other_users(commit->fd)) ||
	    (fcntl(commit->fd, F_OFD_SETLK, &whole) && (errno == EAGAIN || errno == EACCES)))
		return fail(-EBUSY, "%s is in use by another program", commit->path);
	commit->bytes = commit->st.st_size;
	return 0;
}

static int open_target(const struct cow *cow, void *arg)
{
	struct commit *commit = arg;
	uint64_t bytes = cow->sectors * SECTOR_BYTES;
	uint64_t base_bytes = cow->status.base_size_sectors * SECTOR_BYTES;
	int err;

	if (stat(commit->path, &commit->st))
		return fail(-errno, "cannot find %s: %m", commit->path);
	if (S_ISBLK(commit->st.st_mode))
		err = open_device(commit, cow);
	else if (S_ISREG(commit->st.st_mode))
		err = open_file(commit, cow);
	else
		err = fail(-ENOTBLK, "%s is no block device or file", commit->path);
	if (err)
		return err;
	/* Like the base, a file may be shorter than the device. */
	if (commit->bytes < bytes &&
	    (S_ISBLK(commit->st.st_mode) || !base_bytes || commit->bytes < base_bytes))
		return fail(-EIO, "%s has %" PRIu64 " bytes, fewer than the %" PRIu64 " of %s",
			    commit->path, commit->bytes, S_ISBLK(commit->st.st_mode) ||
			    base_bytes > bytes ? bytes : base_bytes, commit->args->name);
	return 0;
}

static int fail_write(const struct commit *commit, int error)
{
	return fail(io_error(error), "cannot write %s: %s", commit->path, strerror(error));
}

static int write_range(struct commit *commit, const char *buf, size_t bytes, uint64_t offset)
{
	int err = write_all(commit->fd, buf, bytes, offset);

	return err ? fail_write(commit, -err) : 0;
}

static int copy_range(struct commit *commit, uint64_t offset, uint64_t end)
{
	int err = 0;

	while (!err && offset < end) {
		size_t n = end - offset < BUF_BYTES ? end - offset : BUF_BYTES;

		if (interrupted())
			return -EINTR;
		err = view_read(&commit->view, commit->buf, n, offset) ?:
		      write_range(commit, commit->buf, n, offset);
		offset += n;
		commit->done += n;
		if (commit->show && !err)
			show_progress(commit->done, commit->sums[WRITTEN], &commit->shown);
	}
	return err;
}

static int write_zeroes(struct commit *commit, uint64_t offset, uint64_t end)
{
	int err = 0;

	memset(commit->buf, 0, BUF_BYTES);
	while (!err && offset < end) {
		size_t n = end - offset < BUF_BYTES ? end - offset : BUF_BYTES;

		err = interrupted() ? -EINTR : write_range(commit, commit->buf, n, offset);
		offset += n;
	}
	return err;
}

static int zero_range(struct commit *commit, uint64_t offset, uint64_t end)
{
	int err = 0;

	while (!err && offset < end) {
		uint64_t span[2] = {
			offset, end - offset < ZERO_BYTES ? end - offset : ZERO_BYTES,
		};

		if (interrupted())
			return -EINTR;
		if (S_ISBLK(commit->st.st_mode))
			err = ioctl(commit->fd, BLKZEROOUT, span) ? fail_write(commit, errno) : 0;
		else if (fallocate(commit->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, span[0],
				   span[1]) &&
			 fallocate(commit->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, span[0],
				   span[1]))
			err = write_zeroes(commit, span[0], span[0] + span[1]);
		offset += span[1];
	}
	return err;
}

static int commit_range(const struct range *range, void *arg)
{
	return range->kind == WRITTEN ? copy_range(arg, range->start, range->end) :
	       range->kind == ZEROED ? zero_range(arg, range->start, range->end) : 0;
}

static int write_changes(struct commit *commit)
{
	const struct view *view = &commit->view;
	uint64_t bytes = view->cow.sectors * SECTOR_BYTES, under_end = commit->bytes;
	int err = walk_device(&view->cow, view->dev, under_end, add_to_sums, commit->sums);

	if (!err && commit->bytes < bytes && ftruncate(commit->fd, bytes))
		err = fail_write(commit, errno);
	if (!err)
		err = walk_device(&view->cow, view->dev, under_end, commit_range, commit);
	if (commit->shown >= 0)
		end_progress(commit->shown);
	view_close(&commit->view);
	if (!err && fsync(commit->fd))
		err = fail_write(commit, errno);
	/* Whoever reads the base now is to see what it has become. */
	if (commit->onto_base) {
		char *path = device_path(view->cow.table.major, view->cow.table.minor);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		/*
		 * When the device has gone, so has the cache of the base; another one of
		 * ours that has its number now loses no more than what it can read again.
		 */
		dm_ask(makedev(view->cow.major, view->cow.minor), "drop_cache", NULL);
		if (fd >= 0) {
			ioctl(fd, BLKFLSBUF);
			close(fd);
		}
		free(path);
	}
	return err;
}

static void report_commit(const struct commit *commit)
{
	struct json_object *object;
	char written[16], zeroed[16], *path;

	if (!commit->args->json) {
		printf("%s: %s written, %s zeroed\n", commit->path,
		       human_size(commit->sums[WRITTEN], written),
		       human_size(commit->sums[ZEROED], zeroed));
		return;
	}
	path = realpath(commit->path, NULL);
	object = json_object_new_object();
	json_object_object_add(object, "name", json_object_new_string(commit->view.cow.name));
	/* Its directory may have a name that is no text. */
	json_object_object_add(object, "file",
			       json_object_new_string(path && printable(path) ? path :
						      commit->path));
	json_object_object_add(object, "written", json_object_new_uint64(commit->sums[WRITTEN]));
	json_object_object_add(object, "zeroed", json_object_new_uint64(commit->sums[ZEROED]));
	print_json(object);
	free(path);
}

int cmd_commit(const struct args *args)
{
	struct commit commit = {
		.args = args, .path = args->value[KEY_TO], .fd = -1, .lock = -1,
		.view.fd = -1, .shown = -1, .show = !args->json && isatty(STDOUT_FILENO),
	};
	int err = parse_flag(args, KEY_FORCE, false, &commit.force);

	if (err)
		return err;
	if (!commit.path)
		return fail(-EINVAL, "commit: to= is missing; see \"cowctl help commit\"");
	if (!printable(commit.path))
		return fail(-EINVAL, "to=%s contains a character that cannot be printed",
			    commit.path);
	commit.buf = aligned_alloc(BLOCK_BYTES, BUF_BYTES);
	if (!commit.buf)
		return fail(-ENOMEM, "out of memory");
	err = view_open(args, &commit.view, open_target, &commit);
	if (!err)
		err = write_changes(&commit);
	view_close(&commit.view);
	if (commit.fd >= 0)
		close(commit.fd);
	if (commit.lock >= 0)
		close(commit.lock);
	free(commit.buf);
	if (!err)
		report_commit(&commit);
	return err;
}
