/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is used of libnbd. It is loaded only where it is used: with all that it needs
 * in turn, it would cost each command more time than its work.
 */
#ifndef NBD_CALLS_H
#define NBD_CALLS_H

#include <libnbd.h>
#include <stdbool.h>

extern struct nbd_calls {
	__typeof__(nbd_create) *create;
	__typeof__(nbd_close) *close;
	__typeof__(nbd_get_errno) *get_errno;
	__typeof__(nbd_add_meta_context) *add_meta_context;
	__typeof__(nbd_set_export_name) *set_export_name;
	__typeof__(nbd_connect_unix) *connect_unix;
	__typeof__(nbd_connect_tcp) *connect_tcp;
	__typeof__(nbd_can_meta_context) *can_meta_context;
	__typeof__(nbd_get_size) *get_size;
	__typeof__(nbd_block_status) *block_status;
	__typeof__(nbd_shutdown) *shutdown;
	__typeof__(nbd_aio_connect_socket) *aio_connect_socket;
	__typeof__(nbd_aio_is_connecting) *aio_is_connecting;
	__typeof__(nbd_aio_is_ready) *aio_is_ready;
	__typeof__(nbd_aio_get_fd) *aio_get_fd;
	__typeof__(nbd_aio_get_direction) *aio_get_direction;
	__typeof__(nbd_aio_notify_read) *aio_notify_read;
	__typeof__(nbd_aio_notify_write) *aio_notify_write;
	__typeof__(nbd_aio_pread) *aio_pread;
	__typeof__(nbd_aio_pwrite) *aio_pwrite;
	__typeof__(nbd_aio_zero) *aio_zero;
	__typeof__(nbd_aio_flush) *aio_flush;
	__typeof__(nbd_aio_block_status) *aio_block_status;
} nbd;

bool load_libnbd(void);

#endif
