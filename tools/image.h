/* SPDX-License-Identifier: GPL-2.0-only */
/* A qcow2 image, which qemu-img makes and judges, and qemu-nbd reads and writes. */
#ifndef IMAGE_H
#define IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define IMAGE_SLOTS		16	/* requests at a time */
#define IMAGE_SLOT_BYTES	(512 << 10)

struct image;

struct slot {
	enum { FREE, SENT, READ } state;	/* READ: to be passed on */
	struct image *image;
	char *buf;
	uint64_t offset;
	size_t bytes;
};

struct image {
	const char *path;		/* for messages; it is opened by number only */
	int fd;				/* -1: not open */
	uint64_t bytes;			/* of the disk in it */
	bool cut;			/* it is whole only if it holds nothing */
	struct nbd_handle *handle;
	pid_t pid;			/* of qemu-nbd, or 0 */
	int message_fd;			/* what it says */
	int signals;
	int err;			/* of the first request that failed */
	char *bufs;
	struct slot slots[IMAGE_SLOTS];
	/* takes what was read */
	int (*pass_on)(void *arg, const void *buf, size_t bytes, uint64_t offset);
	void *arg;
};

/* What the image holds of its own somewhere, told in order. */
struct image_range {
	uint64_t start;
	uint64_t end;
	bool allocated;
	bool zero;
};

/* What qemu-img tells of an image. */
struct image_info {
	uint64_t bytes;			/* of the disk in it */
	uint64_t end;			/* of what is used of the file, if it was checked */
	uint64_t compressed;		/* clusters, likewise */
	bool encrypted;
	char *backing;			/* as it names it, or NULL */
	char *format;			/* of that, or NULL */
};

int parse_image_info(const char *text, struct image_info *info);
void image_info_free(struct image_info *info);
int image_create(struct image *image, uint64_t bytes, const char *backing, const char *format);
int image_examine(const struct image *image, struct image_info *info);
int image_check(struct image *image);
int image_start(struct image *image, bool read_only);
void *image_buffer(struct image *image, struct slot **slot);
int image_write(struct image *image, struct slot *slot, uint64_t offset, size_t bytes);
int image_zero(struct image *image, uint64_t offset, uint64_t bytes);
int image_read(struct image *image, uint64_t offset, uint64_t bytes);
int image_walk(struct image *image, int (*visit)(const struct image_range *range, void *arg),
	       void *arg);
int image_settle(struct image *image);
int image_flush(struct image *image);
int image_end(struct image *image, int err);
int image_pad(const struct image *image);

#endif
