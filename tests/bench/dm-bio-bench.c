// SPDX-License-Identifier: GPL-2.0-only
/*
 * A device-mapper target that makes requests for another device and tells how
 * long they took: the cost of a request without system calls.
 *
 *	dmsetup create bench --table "0 1 bio-bench /dev/mapper/cow"
 *	dmsetup message bench 0 read random 4096 4096 32768 32
 *
 * reads 32768 times 4096 bytes, 32 requests at a time, and prints the
 * nanoseconds of all. They begin at multiples of the second number; "random"
 * takes each of them once in a scattered order, for which the count must be a
 * power of two, "sequential" one after the other. All have the same buffer. A
 * seventh word is the sector where to begin.
 */

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/slab.h>

#define DM_MSG_PREFIX "bio-bench"

#define MOST_BYTES	SZ_1M
#define MOST_DEPTH	256

/* What is asked for, and the requests that do it. */
struct job {
	struct block_device *bdev;
	u64 start;
	enum req_op op;
	bool random;
	u32 bytes;
	u32 depth;
	u32 vecs;
	u64 stride;
	u64 count;
	atomic_t pending;
	struct completion done;
	blk_status_t status;
	struct bio_vec vec[MOST_BYTES / PAGE_SIZE];
	struct bio *bio;
};

/* The n-th of count positions, scattered: a bijection of each power of two. */
static u64 scatter(u64 n, u64 count)
{
	int half = (ilog2(count) + 1) / 2;

	n = n * 0x9e3779b97f4a7c15ULL & (count - 1);
	n ^= n >> half;
	return n * 0xbf58476d1ce4e5b9ULL & (count - 1);
}

static void end_request(struct bio *bio)
{
	struct job *job = bio->bi_private;

	if (bio->bi_status)
		job->status = bio->bi_status;
	if (atomic_dec_and_test(&job->pending))
		complete(&job->done);
}

/* Context: process, sleeps. */
static void submit_batch(struct job *job, u64 first, u32 count)
{
	struct blk_plug plug;
	u32 i;

	reinit_completion(&job->done);
	atomic_set(&job->pending, count + 1);
	blk_start_plug(&plug);
	for (i = 0; i < count; i++) {
		struct bio *bio = &job->bio[i];
		u64 n = job->random ? scatter(first + i, job->count) : first + i;

		bio_init(bio, job->bdev, job->vec, job->vecs,
			 job->op | REQ_SYNC | REQ_IDLE);
		bio->bi_vcnt = job->vecs;
		bio->bi_iter.bi_size = job->bytes;
		bio->bi_iter.bi_sector = job->start + (n * job->stride >> SECTOR_SHIFT);
		bio->bi_end_io = end_request;
		bio->bi_private = job;
		submit_bio(bio);
	}
	blk_finish_plug(&plug);
	if (!atomic_dec_and_test(&job->pending))
		wait_for_completion(&job->done);
	for (i = 0; i < count; i++)
		bio_uninit(&job->bio[i]);
}

/* Returns 0, -ENOMEM or the error of the last request that failed. */
static int run(struct job *job, u64 *ns)
{
	u64 start, n;
	u32 i;

	init_completion(&job->done);
	job->bio = kvcalloc(job->depth, sizeof(*job->bio), GFP_KERNEL);
	if (!job->bio)
		return -ENOMEM;
	job->vecs = DIV_ROUND_UP(job->bytes, PAGE_SIZE);
	for (i = 0; i < job->vecs; i++) {
		struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

		if (!page)
			return -ENOMEM;
		job->vec[i] = (struct bio_vec) {
			.bv_page = page,
			.bv_len = min_t(u32, PAGE_SIZE, job->bytes - i * PAGE_SIZE),
		};
	}
	start = ktime_get_ns();
	for (n = 0; n < job->count && !fatal_signal_pending(current); n += job->depth)
		submit_batch(job, n, min_t(u64, job->depth, job->count - n));
	*ns = ktime_get_ns() - start;
	return n < job->count ? -EINTR : blk_status_to_errno(job->status);
}

static bool parse(struct job *job, unsigned int argc, char **argv)
{
	u64 sectors = bdev_nr_sectors(job->bdev);

	if (argc < 6 || argc > 7)
		return false;
	if (!strcmp(argv[0], "write"))
		job->op = REQ_OP_WRITE;
	else if (strcmp(argv[0], "read"))
		return false;
	job->random = !strcmp(argv[1], "random");
	if (!job->random && strcmp(argv[1], "sequential"))
		return false;
	if (kstrtou32(argv[2], 10, &job->bytes) || kstrtou64(argv[3], 10, &job->stride) ||
	    kstrtou64(argv[4], 10, &job->count) || kstrtou32(argv[5], 10, &job->depth) ||
	    (argc == 7 && kstrtou64(argv[6], 10, &job->start)))
		return false;
	return job->bytes && job->bytes <= MOST_BYTES && IS_ALIGNED(job->bytes, SECTOR_SIZE) &&
	       job->stride >= job->bytes && IS_ALIGNED(job->stride, SECTOR_SIZE) &&
	       job->count && job->start <= sectors &&
	       job->count <= div64_u64((sectors - job->start) << SECTOR_SHIFT, job->stride) &&
	       (!job->random || is_power_of_2(job->count)) &&
	       job->depth && job->depth <= MOST_DEPTH;
}

static int bench_message(struct dm_target *ti, unsigned int argc, char **argv,
			 char *result, unsigned int maxlen)
{
	struct dm_dev *dev = ti->private;
	struct job *job = kvzalloc(sizeof(*job), GFP_KERNEL);
	u64 ns;
	int ret;
	u32 i;

	if (!job)
		return -ENOMEM;
	job->bdev = dev->bdev;
	ret = parse(job, argc, argv) ? run(job, &ns) : -EINVAL;
	for (i = 0; i < job->vecs; i++)
		if (job->vec[i].bv_page)
			__free_page(job->vec[i].bv_page);
	kvfree(job->bio);
	kvfree(job);
	if (ret)
		return ret;
	scnprintf(result, maxlen, "%llu", ns);
	return 1;
}

static int bench_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct dm_dev *dev;
	int ret;

	if (argc != 1) {
		ti->error = "Needs a device";
		return -EINVAL;
	}
	ret = dm_get_device(ti, argv[0], dm_table_get_mode(ti->table), &dev);
	if (ret) {
		ti->error = "Cannot open the device";
		return ret;
	}
	ti->private = dev;
	return 0;
}

static void bench_dtr(struct dm_target *ti)
{
	dm_put_device(ti, ti->private);
}

static int bench_map(struct dm_target *ti, struct bio *bio)
{
	return DM_MAPIO_KILL;
}

static struct target_type bench_target = {
	.name = "bio-bench",
	.version = {1, 0, 0},
	.module = THIS_MODULE,
	.ctr = bench_ctr,
	.dtr = bench_dtr,
	.map = bench_map,
	.message = bench_message,
};

static int __init bench_init(void)
{
	return dm_register_target(&bench_target);
}
module_init(bench_init);

static void __exit bench_exit(void)
{
	dm_unregister_target(&bench_target);
}
module_exit(bench_exit);

MODULE_DESCRIPTION(DM_NAME " target that measures the cost of requests");
MODULE_LICENSE("GPL");
