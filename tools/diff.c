// SPDX-License-Identifier: GPL-2.0-only
/*
 * diff keeps the changes of a device as a qcow2 image, and load makes them those of a
 * fresh device again. The base is read by neither.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"
#include "image.h"

/* The file to be made: under another name, in its directory, until it is whole. */
struct output {
	const char *path;		/* as typed */
	char *dir;
	char *part;			/* its name meanwhile */
	char *final;
	int lock;
};

struct diff {
	const struct args *args;
	struct output output;
	struct view view;
	struct image image;
	char *backing;
	const char *format;
	uint64_t under_end;		/* see walk_device() */
	uint64_t sums[KINDS];
	uint64_t done;
	int shown;			/* of the progress; -1 before */
	bool show;
};

static int parse_output(const char *path, struct output *output)
{
	const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
	char *dir = slash ? strndup(path, slash - path + 1) : strdup(".");
	struct stat st;

	output->path = path;
	output->lock = -1;
	output->dir = dir ? realpath(dir, NULL) : NULL;
	free(dir);
	if (!*name)
		return fail(-EINVAL, "%s is the name of a directory", path);
	if (!output->dir)
		return fail(-errno, "cannot find the directory of %s: %m", path);
	output->part = xasprintf("%s/.%s.cowctl-part", output->dir, name);
	output->final = xasprintf("%s/%s", output->dir, name);
	output->lock = lock_slot(output->final, LOCK_TRY);
	if (output->lock == -EBUSY)
		return fail(-EBUSY, "%s is just being written by another cowctl", path);
	if (output->lock < 0)
		return output->lock;
	return lstat(output->final, &st) ? 0 : fail(-EEXIST, "%s exists already", path);
}

/* What the whole disk has may be secret, and only root may read it there. */
static int open_output(const struct output *output)
{
	int fd;

	/* what one that was killed has left */
	unlink(output->part);
	fd = open(output->part, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	return fd < 0 ? fail(io_error(errno), "cannot make %s: %m", output->path) : fd;
}

/* It is not to be seen under its name before it is on the disk, nor to replace another. */
static int publish(const struct output *output, int fd)
{
	int dir, err = 0;

	if (fsync(fd))
		return fail(io_error(errno), "cannot write %s: %m", output->path);
	if (interrupted())
		return -EINTR;
	if (renameat2(AT_FDCWD, output->part, AT_FDCWD, output->final, RENAME_NOREPLACE))
		err = -errno;
	/* not all file systems know how */
	if (err == -EINVAL && access(output->final, F_OK))
		err = rename(output->part, output->final) ? -errno : 0;
	if (err)
		return fail(io_error(-err), "cannot make %s: %s", output->path,
			    strerror(-err));
	dir = open(output->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir >= 0) {
		fsync(dir);
		close(dir);
	}
	return 0;
}

static void forget_output(struct output *output)
{
	if (output->lock >= 0)
		close(output->lock);
	free(output->dir);
	free(output->part);
	free(output->final);
}

/*
 * The backing file
 */

/*
 * What the image is recorded to stand on: what is given, or the base. A file whose
 * name qemu would take for more than that gets a directory before it.
 */
static int choose_backing(const struct cow *cow, void *arg)
{
	struct diff *diff = arg;
	const char *given = diff->args->value[KEY_BACKING];
	bool file;

	diff->format = diff->args->value[KEY_FORMAT] ?: "raw";
	if (!given) {
		diff->backing = base_source(cow);
		if (!strstr(diff->backing, "://") && access(diff->backing, F_OK))
			return fail(-ENOENT, "%s, the base of %s, is not there; say backing=",
				    diff->backing, diff->args->name);
		return 0;
	}
	if (!printable(given))
		return fail(-EINVAL, "backing=%s contains a character that cannot be printed",
			    given);
	file = !strstr(given, "://") && given[strcspn(given, ":/")] == ':';
	diff->backing = xasprintf("%s%s", file ? "./" : "", given);
	return 0;
}

/* How far what is under the image may reach: further than what the device shows of it. */
static uint64_t backing_end(const struct diff *diff)
{
	const struct cow *cow = &diff->view.cow;
	char *path = xasprintf("%s%s%s", *diff->backing == '/' ? "" : diff->output.dir,
			       *diff->backing == '/' ? "" : "/", diff->backing);
	uint64_t end = device_bytes(makedev(cow->table.major, cow->table.minor)), bytes = 0;
	struct stat st;

	if (!strcmp(diff->format, "raw") && !stat(path, &st))
		bytes = S_ISBLK(st.st_mode) ? device_bytes(st.st_rdev) : (uint64_t)st.st_size;
	free(path);
	return bytes > end ? bytes : end;
}

/*
 * Saving
 */

static int save_range(const struct range *range, void *arg)
{
	struct diff *diff = arg;
	uint64_t offset = range->start, bytes;
	struct slot *slot;
	int err = 0;

	if (range->kind == ZEROED)
		err = image_zero(&diff->image, range->start, range->end - range->start);
	for (; range->kind == WRITTEN && !err && offset < range->end; offset += bytes) {
		void *buf = image_buffer(&diff->image, &slot);

		if (!buf)
			return interrupted() ? -EINTR : -EIO;
		bytes = range->end - offset < IMAGE_SLOT_BYTES ? range->end - offset :
			IMAGE_SLOT_BYTES;
		err = interrupted() ? -EINTR : view_read(&diff->view, buf, bytes, offset);
		if (!err)
			err = image_write(&diff->image, slot, offset, bytes);
		diff->done += bytes;
		if (diff->show && !err)
			show_progress(diff->done, diff->sums[WRITTEN], &diff->shown);
	}
	return err;
}

static int save(struct diff *diff)
{
	const struct view *view = &diff->view;
	int err = walk_device(&view->cow, view->dev, diff->under_end, add_to_sums, diff->sums);

	if (!err)
		err = image_start(&diff->image, false);
	else
		return err;
	if (!err)
		err = walk_device(&view->cow, view->dev, diff->under_end, save_range, diff) ?:
		      image_settle(&diff->image);
	if (diff->shown >= 0)
		end_progress(diff->shown);
	/* It costs the device memory, and is not needed any more. */
	view_close(&diff->view);
	if (!err)
		err = image_flush(&diff->image);
	return image_end(&diff->image, err);
}

static int make_image(struct diff *diff)
{
	int err;

	diff->image.path = diff->output.path;
	diff->image.fd = open_output(&diff->output);
	if (diff->image.fd < 0)
		return diff->image.fd;
	err = image_create(&diff->image, diff->view.cow.sectors * SECTOR_BYTES, diff->backing,
			   diff->format) ?:
	      save(diff) ?:
	      image_pad(&diff->image) ?:
	      publish(&diff->output, diff->image.fd);
	close(diff->image.fd);
	if (err)
		unlink(diff->output.part);
	return err;
}

static void report_diff(const struct diff *diff)
{
	const struct output *output = &diff->output;
	struct json_object *object;
	char written[16], zeroed[16];

	if (!diff->args->json) {
		printf("%s: %s written, %s zeroed, on top of %s\n", output->path,
		       human_size(diff->sums[WRITTEN], written),
		       human_size(diff->sums[ZEROED], zeroed), diff->backing);
		return;
	}
	object = json_object_new_object();
	json_object_object_add(object, "name", json_object_new_string(diff->view.cow.name));
	/* The directory may have a name that is no text. */
	json_object_object_add(object, "file",
			       json_object_new_string(printable(output->final) ? output->final :
						      output->path));
	json_object_object_add(object, "size", json_object_new_uint64(diff->image.bytes));
	json_object_object_add(object, "written", json_object_new_uint64(diff->sums[WRITTEN]));
	json_object_object_add(object, "zeroed", json_object_new_uint64(diff->sums[ZEROED]));
	json_object_object_add(object, "backing", json_object_new_string(diff->backing));
	json_object_object_add(object, "format", json_object_new_string(diff->format));
	print_json(object);
}

int cmd_diff(const struct args *args)
{
	struct diff diff = {
		.args = args, .view.fd = -1, .shown = -1,
		.show = !args->json && isatty(STDOUT_FILENO),
	};
	int err;

	if (!args->file)
		return fail(-EINVAL, "diff: the file to make is missing; %s",
			    args->named ? "a file without .qcow2 takes a ./ before it" :
			    "see \"cowctl help diff\"");
	if (!printable(args->file))
		return fail(-EINVAL, "the name of the file, %s, cannot be printed", args->file);
	if (!printable(args->value[KEY_FORMAT] ?: ""))
		return fail(-EINVAL, "format=%s cannot be printed", args->value[KEY_FORMAT]);
	if (args->value[KEY_FORMAT] && !args->value[KEY_BACKING])
		return fail(-EINVAL, "diff: format= is that of backing=, which is missing");
	err = parse_output(args->file, &diff.output) ?:
	      view_open(args, &diff.view, choose_backing, &diff);
	if (!err) {
		diff.under_end = backing_end(&diff);
		err = make_image(&diff);
	}
	view_close(&diff.view);
	if (!err)
		report_diff(&diff);
	forget_output(&diff.output);
	free(diff.backing);
	return err;
}

/*
 * Loading
 */

struct load {
	const struct args *args;
	struct cow cow;
	struct image image;
	int fd;				/* of the device */
	bool held;			/* nobody can have changed the file, see hold_file() */
	uint64_t sums[KINDS];
	int shown;
	bool show;
};

static int write_device(void *arg, const void *buf, size_t bytes, uint64_t offset)
{
	struct load *load = arg;
	int err = write_all(load->fd, buf, bytes, offset);

	return err ? fail(io_error(-err), "cannot write to %s: %s", load->args->name,
			  strerror(-err)) : 0;
}

static int load_range(const struct image_range *range, void *arg)
{
	uint64_t span[2] = { range->start, range->end - range->start };
	struct load *load = arg;
	int err = 0;

	if (interrupted())
		return -EINTR;
	if (range->allocated && load->image.cut)
		return fail(-EIO, "%s was cut off: some bytes are missing at its end",
			    load->image.path);
	if (range->allocated && range->zero) {
		load->sums[ZEROED] += span[1];
		if (ioctl(load->fd, BLKZEROOUT, span))
			err = fail(io_error(errno), "cannot write to %s: %m", load->args->name);
	} else if (range->allocated) {
		load->sums[WRITTEN] += span[1];
		err = image_read(&load->image, span[0], span[1]);
	}
	if (load->show && !err)
		show_progress(range->end, load->image.bytes, &load->shown);
	return err;
}

/*
 * The backing file that the image names is compared with the base by what is known of
 * it without opening it.
 */
static int check_backing(const struct load *load, const struct image_info *info, bool force)
{
	const char *backing = info->backing, *format = info->format;
	uint64_t base_bytes = load->cow.status.base_size_sectors * SECTOR_BYTES, bytes = 0;
	char *source = base_source(&load->cow), *image = realpath(load->image.path, NULL);
	struct stat backing_st, source_st;
	char *path = NULL;
	int err = 0;

	if (!backing || force)
		goto out;
	if (*backing == '/' || strstr(backing, "://") || !image || !strrchr(image, '/'))
		path = xasprintf("%s", backing);
	else
		path = xasprintf("%.*s%s", (int)(strrchr(image, '/') - image + 1), image, backing);
	if (!strcmp(path, source))
		goto out;
	if (!strstr(path, "://") && !stat(path, &backing_st)) {
		if (!stat(source, &source_st) && source_st.st_dev == backing_st.st_dev &&
		    source_st.st_ino == backing_st.st_ino)
			goto out;
		if (S_ISBLK(backing_st.st_mode))
			bytes = device_bytes(backing_st.st_rdev);
		else if (S_ISREG(backing_st.st_mode) && !strcmp(format ?: "raw", "raw"))
			bytes = backing_st.st_size;
	}
	if (bytes && bytes / SECTOR_BYTES * SECTOR_BYTES != base_bytes)
		err = fail(-EIO, "%s was saved on top of %s, not as large as %s; or say force=true",
			   load->image.path, backing, source);
	else
		warn("%s was saved on top of %s; %s must have the same content", load->image.path,
		     backing, source);
out:
	free(path);
	free(image);
	free(source);
	return err;
}

static int check_image(struct load *load, bool force)
{
	uint64_t bytes = load->cow.sectors * SECTOR_BYTES;
	struct image_info info;
	int err = image_examine(&load->image, &info);

	if (!err && info.bytes != bytes)
		err = fail(-EIO, "%s is a disk of %" PRIu64 " bytes, but %s has %" PRIu64,
			   load->image.path, info.bytes, load->args->name, bytes);
	if (!err)
		err = image_check(&load->image) ?: check_backing(load, &info, force);
	image_info_free(&info);
	load->image.bytes = bytes;
	return err;
}

static int check_fresh(const struct load *load)
{
	const struct cow_status *status = &load->cow.status;

	return status->used_blocks || status->zeroed_blocks ?
	       fail(-EEXIST, "%s has been changed already; \"cowctl reset\" it first",
		    load->args->name) : 0;
}

static int copy_in(struct load *load)
{
	int err = image_start(&load->image, true);

	if (!err)
		err = image_walk(&load->image, load_range, load) ?: image_settle(&load->image);
	if (load->shown >= 0)
		end_progress(load->shown);
	err = image_end(&load->image, err);
	if (!err && load->held && !still_held(load->image.fd))
		err = fail(-EBUSY, "%s was opened for writing by another program",
			   load->image.path);
	if (!err && fsync(load->fd))
		err = fail(-errno, "cannot write to %s: %m", load->args->name);
	return !err && interrupted() ? -EINTR : err;
}

/* Nobody else may use the device meanwhile, nor keep in memory what it had before. */
static int load_device(struct load *load)
{
	int err;

	load->fd = open(load->cow.path, O_RDWR | O_EXCL | O_DIRECT | O_CLOEXEC);
	if (load->fd < 0)
		return errno == EBUSY ? fail_busy(load->args, &load->cow, "") :
		       fail(-errno, "cannot open %s: %m", load->cow.path);
	/* again, now that nobody can change it */
	err = find_cow(load->args, &load->cow) ?: check_fresh(load);
	if (!err) {
		err = copy_in(load);
		/* What has been loaded is no use, and there was nothing before. */
		if (err)
			dm_message(load->args, "reset");
	}
	ioctl(load->fd, BLKFLSBUF);
	close(load->fd);
	return err;
}

static int load_locked(struct load *load, bool force)
{
	int err = find_cow(load->args, &load->cow), n;

	if (!err)
		err = check_fresh(load) ?: check_image(load, force);
	if (err)
		return err;
	/* Devices of partitions are made anew, for there may be others then. */
	n = parts_find(&load->cow, NULL);
	err = check_closed(load->args, &load->cow, "") ?:
	      (n ? parts_unmap(load->cow.path) : 0);
	if (err)
		return err;
	err = load_device(load);
	return n ? parts_renew(&load->cow, "loaded", err) : err;
}

static int open_input(struct load *load)
{
	struct stat st;
	int err;

	load->image.path = load->args->file;
	load->image.fd = open(load->args->file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (load->image.fd < 0)
		return fail(-errno, "cannot open %s: %m", load->args->file);
	if (fstat(load->image.fd, &st) || (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)))
		return fail(-EIO, "%s is no file", load->args->file);
	/* What is checked is to be what is read then. */
	err = hold_file(load->image.fd);
	if (err == -EBUSY)
		return fail(err, "%s is open for writing in another program", load->args->file);
	load->held = !err;
	return 0;
}

int cmd_load(const struct args *args)
{
	struct load load = {
		.args = args, .image.fd = -1, .image.pass_on = write_device, .shown = -1,
		.show = !args->json && isatty(STDOUT_FILENO),
	};
	char written[16], zeroed[16];
	int err, lock;
	bool force;

	load.image.arg = &load;
	if (!args->file)
		return fail(-EINVAL, "load: the file to load is missing; %s",
			    args->named ? "a file without .qcow2 takes a ./ before it" :
			    "see \"cowctl help load\"");
	err = parse_flag(args, KEY_FORCE, false, &force);
	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = open_input(&load) ?: load_locked(&load, force);
	if (load.image.fd >= 0)
		close(load.image.fd);
	close(lock);
	if (!err && args->json)
		return report(args);
	if (!err)
		printf("%s: %s written, %s zeroed\n", load.cow.path,
		       human_size(load.sums[WRITTEN], written),
		       human_size(load.sums[ZEROED], zeroed));
	return err;
}
