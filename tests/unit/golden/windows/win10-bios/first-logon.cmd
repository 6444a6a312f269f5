@echo off
rem Runs once, at the first logon: installs the guest tools, then makes the machine a template for clones.
rem What it says goes to the first serial port, which the host watches.
rem vdibuild: office
setlocal

rem Windows logs on once more often than LogonCount says, a known fault: here it ends.
reg add "HKLM\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Winlogon" /v AutoLogonCount /t REG_DWORD /d 0 /f

set what=finding the virtio-win medium
set tools=
for %%d in (D E F G H) do if exist %%d:\virtio-win-guest-tools.exe set tools=%%d:\virtio-win-guest-tools.exe
if not defined tools goto failed

set what=installing virtio-win-guest-tools
call :say %what%
start "" /wait "%tools%" /install /quiet /norestart
if not %errorlevel%==0 if not %errorlevel%==3010 goto failed

rem The clones may update their apps again.
reg delete HKLM\SOFTWARE\Policies\Microsoft\WindowsStore /v AutoDownload /f

set what=sysprep
call :say %what%
start "" /wait "%SystemRoot%\System32\Sysprep\sysprep.exe" /generalize /oobe /shutdown /quiet /unattend:%~dp0clone.xml
if not exist "%SystemRoot%\System32\Sysprep\Sysprep_succeeded.tag" goto failed
call :say done
exit /b 0

:failed
call :say failed: %what% ended with status %errorlevel%
if exist "%SystemRoot%\System32\Sysprep\Panther\setuperr.log" type "%SystemRoot%\System32\Sysprep\Panther\setuperr.log" >COM1
shutdown /s /t 0
exit /b 1

:say
echo vdibuild: %* >COM1
exit /b 0
