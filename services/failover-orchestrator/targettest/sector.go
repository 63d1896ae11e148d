package targettest

// ConsoleText is what BootSector's program writes to the first serial port, followed by how often the disk was booted.
const ConsoleText = "landfall boot "

// BootSector is the first sector of a disk that a PC BIOS boots: a program without an operating system that adds one to
// the first byte of the second sector, writes ConsoleText with that number ("1" to "9") to the serial port and halts.
// The number shows whether what a machine wrote is still there when it is started again.
func BootSector() []byte {
	sector := make([]byte, 512)
	program := []byte{
		0x31, 0xC0, //       xor ax, ax
		0x8E, 0xD8, //       mov ds, ax
		0x8E, 0xC0, //       mov es, ax
		0xB8, 0x01, 0x02, // mov ax, 0x0201   read one sector
		0xBB, 0x00, 0x7E, // mov bx, 0x7E00   to here
		0xB9, 0x02, 0x00, // mov cx, 2        the second of the disk
		0x30, 0xF6, //       xor dh, dh       that dl names
		0xCD, 0x13, //       int 0x13
		0xFE, 0x06, 0x00, 0x7E, // inc byte [0x7E00]
		0xB8, 0x01, 0x03, // mov ax, 0x0301   write it
		0xCD, 0x13, //       int 0x13
		0xA0, 0x00, 0x7E, // mov al, [0x7E00]
		0x04, '0', //        add al, '0'
		0xA2, 0x43, 0x7C, // mov [text+14], al
		0xBE, 0x35, 0x7C, // mov si, text
		0xAC,       // next: lodsb
		0x84, 0xC0, //       test al, al
		0x74, 0x06, //       jz done
		0xBA, 0xF8, 0x03, // mov dx, 0x3F8
		0xEE,       //       out dx, al
		0xEB, 0xF5, //       jmp next
		0xF4,       // done: hlt
		0xEB, 0xFD, //       jmp done
	}
	n := copy(sector, program)
	copy(sector[n:], ConsoleText+"?\r\n\x00")
	sector[510], sector[511] = 0x55, 0xAA
	return sector
}
